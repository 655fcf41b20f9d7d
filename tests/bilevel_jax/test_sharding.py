"""Arrays on several devices: `shard_map`, and `NamedSharding` on Auto and Explicit meshes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")


@pytest.mark.slow
def test_all_holds_on_eight_devices():
    """One process for all checks: JAX and its eight devices take long to start."""
    script = Path(__file__).parents[1] / "helpers" / "eight_devices.py"
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
