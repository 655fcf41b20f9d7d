"""FSDP2 as other packages set it up: `bilevel_torch.Sharded` computes the hypergradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")
PROGRAM = Path(__file__).parents[1] / "helpers" / "launched_ranks.py"


@pytest.mark.slow
def test_fabric_and_accelerate(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, PROGRAM, tmp_path], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == {"by_fabric", "by_accelerate"}
        assert max(found.values()) <= 1e-5  # in float32
