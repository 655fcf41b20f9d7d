"""The table of least times."""

import re

import pytest

pytest.importorskip("torch")
roofline = pytest.importorskip("benchmarks.roofline")


def test_the_table(capsys):
    roofline.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    peaks = re.fullmatch(r"Peaks: (\d+) GFLOP/s, (\d+\.\d) GB/s", lines[0])
    assert peaks is not None
    assert all(float(peak) > 0 for peak in peaks.groups())
    assert re.fullmatch(r"\| logistic \| \d+\.\d\d \| \d+\.\d \| \d+\.\d ms \| \d+\.\d\d \| \d+\.\d\d \|", lines[-1])
