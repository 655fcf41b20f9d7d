"""The benchmark of many queries runs, and its columns compute the same; no time is asserted."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "many_queries.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only"),
]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_one_call_and_a_loop_agree(framework):
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    done = subprocess.run([sys.executable, SCRIPT, framework, "3"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    difference = re.search(r"Difference (\S+)\. Memory", done.stdout)
    assert difference is not None, done.stdout
    assert float(difference[1]) <= 1e-4
