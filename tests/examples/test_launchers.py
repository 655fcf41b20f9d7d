"""FSDP2 as other packages set it up: `bilevel_torch.Sharded` computes the hypergradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
HELPERS = Path(__file__).parents[1] / "helpers"


def run(*command):
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_fabric_and_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*launcher, HELPERS / "launched_ranks.py", tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == {"by_fabric", "by_accelerate"}
        assert max(found.values()) <= 1e-5  # in float32


@pytest.mark.slow
def test_ray_train(tmp_path):
    pytest.importorskip("ray.train", reason="Ray is no dependency: pip install 'ray[train]'")
    run(HELPERS / "ray_workers.py", tmp_path)
    for rank in (0, 1):
        assert float((tmp_path / f"{rank}.txt").read_text()) <= 1e-10
