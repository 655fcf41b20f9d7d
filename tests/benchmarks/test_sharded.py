"""The counts of memory and traffic with sharded parameters: they hold for all sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)

ROOT, LAYERS = Path(__file__).parents[2], 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "whole", "gathered", "transfers"),
    [
        ([], 2, 1, 4 * LAYERS - 2),  # v once, the weights twice but of the first layer, and the gradients
        (["--stay"], 2 + LAYERS, 1 + LAYERS, 2 * LAYERS),
    ],
)
def test_a_product_sends_four_copies_and_holds_one_gathered_layer(option, whole, gathered, transfers):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.sharded", "--ranks", "2", "--width", "80"]
    done = subprocess.run(
        [*command, "--layers", str(LAYERS), *option], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert [float(cell) for cell in cells[3:7]] == [whole, gathered, transfers / LAYERS, transfers]
    assert float(cells[2]) <= 0.5 + 0.05
