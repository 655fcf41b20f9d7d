"""The job of an augmentation runs, on small digits; no accuracy is asserted."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "augmentation_job.py"
pytestmark = pytest.mark.slow


def test_a_short_job_prints_a_line_for_each_damping():
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    command = [sys.executable, SCRIPT, "--seeds", "1", "--steps", "10", "--dampings", "none", "auto", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["none", "auto", "1"]
    moved = [re.findall(r"magnitudes \[(.*?)\]", line)[0] != ", ".join(["0.018"] * 6) for line in lines]
    assert moved == [False, True, True]
