"""Arrays on several devices: `shard_map`, and `NamedSharding` on Auto and Explicit meshes."""

import socket
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


@pytest.mark.slow
def test_all_holds_on_two_processes():
    """Two processes compute the derivatives of one process.

    The derivatives are sharded as their arguments are. No process receives the params of another.
    """
    script = Path(__file__).parents[1] / "helpers" / "jax_processes.py"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, script, str(rank), port] for rank in (0, 1)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    for process in processes:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
