"""`bilevel_torch.FirstOrder` under DistributedDataParallel and FSDP2, with two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "helpers" / "first_order_ranks.py"


def test_the_mean_over_two_ranks_is_the_hypergradient_of_one_process(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), "2", tmp_path / "store"],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    printed, _ = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    errors = [float(line) for line in printed.split()]
    assert len(errors) == 4
    assert max(errors) < 1e-4
