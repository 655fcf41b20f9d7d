"""The table of compiled products."""

import re

import pytest

pytest.importorskip("torch")
compiled = pytest.importorskip("benchmarks.compiled")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # a network without a hidden layer
def test_the_table(capsys):
    compiled.main(["--quick", "--compiler", "eager"])
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mlp")]
    assert re.fullmatch(r"\| mlp( \| \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)){2} \| \d+ s \|", row)
