"""Ranks with different batches, under DistributedDataParallel with gloo: the answer is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import relative_error

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)
import ranks  # noqa: E402

pytestmark = pytest.mark.slow

CASES = [
    *ranks.SOLVERS,
    "unrolled",
    "forward",
    "gauss-newton",
    "micro-batches",
    "one rank's",
    "an odd machine",
    "fully_shard",
]

ENDS = """
import sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bilevel_torch


def threads():
    while True:
        try:
            return sum("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))
        except OSError:  # a thread has ended since it was listed
            pass


def step():
    net = DistributedDataParallel(torch.nn.Linear(2, 1)).module
    h, x = torch.zeros((), requires_grad=True), torch.ones(3, 2)
    inner, outer = (net(x) ** 2).mean() + h.exp() * (net.weight**2).sum(), net(x).mean()
    backend = bilevel_torch.DataParallel()
    bilevel_torch.backward(inner, outer, net.parameters(), h, solver={"name": "cg", "damping": 1.0}, backend=backend)


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
step()
during = threads()
dist.destroy_process_group()
end = time.monotonic() + 10  # the system lists a thread for a moment longer than it can be waited for
while threads() and time.monotonic() < end:
    time.sleep(0.01)
print(during > 0, threads())
"""


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    script, env = ranks.__file__, {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def one():
    return ranks.compute(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_one_process_on_the_joined_batch(several, one, case):
    """After outer steps with training by DDP between them, whose reduction goes on working."""
    for rank in several:
        for found, expected in zip(rank["results"][case], one[case], strict=True):
            assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_agree_to_the_last_bit(several, case):
    first, *others = (rank["results"][case] for rank in several)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_goes_wrong_on_one_rank_is_known_to_all(several):
    last = len(several) - 1
    for rank in several:
        said = rank["said"]
        assert said["nan"].startswith(f"SolverError: CG: On rank {last}: The inner loss is nan or infinite. Check")
        first = f"SolverError: CG: On rank {last}: The inner loss is finite, but its gradient ∂L/∂w is nan"
        assert said["nan gradient"].startswith(first)
        assert said["maxiter"].startswith("SolverError: CG: stopped after 1 step")
        assert f"inner_samples: only some ranks give it: rank {last} and the others" in said["given on some"]
        assert "hparams are not the same on all ranks: rank 1" in said["unequal"]
        assert "hparams are other tensors on rank" in said["own weights"]
        odd = 0 if last > 1 else 1  # of two ranks, the second is named
        assert f"params are other tensors on rank {odd}, by" in said["frozen on one"]
        assert f"or on_failure differ between the ranks: rank {last} and the others" in said["solver"]
        expected = {"nan", "nan gradient", "maxiter", "given on some", "unequal", "own weights", "frozen on one"}
        assert set(said) - {"not in the group"} == expected | {"solver", "alone"}


def test_options_of_ddp_change_nothing(several):
    """After join() with uneven batches, with find_unused_parameters, and between the parts of an accumulation."""
    for rank in several:
        assert max(rank["ddp options"]) <= 1e-10


def test_an_error_on_one_rank_ends_the_others(several):
    *others, last = [rank["raised"] for rank in several]
    assert last == "MemoryError: no memory, in a test"
    for said in others:
        assert said.startswith(f"RuntimeError: DataParallel: rank {len(others)} has raised {last}")


def test_a_rank_outside_of_the_group_is_told(several):
    said = [rank["said"].get("not in the group") for rank in several]
    message = "DataParallel: rank 0 is not in the group. Make no DataParallel there."
    assert said == [message] + [None] * (len(several) - 1)


def test_a_rank_without_the_others_is_warned(several):
    for rank in several:
        assert f"one of {len(several)} ranks" in rank["said"]["alone"]
        assert "backend=bilevel_torch.DataParallel(" in rank["said"]["alone"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of threads are read from /proc")
def test_the_threads_of_a_group_end_with_it(tmp_path):
    """Else one may drop the tensor of a reduction while the interpreter ends, which aborts the process."""
    command = [sys.executable, "-c", ENDS, str(tmp_path / "store")]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_without_a_process_group_it_says_so():
    with pytest.raises(ValueError, match=r"there is no process group: call torch\.distributed\.init_process_group"):
        bilevel_torch.DataParallel()


def test_sharded_parameters_need_another_backend():
    from torch.distributed.fsdp import fully_shard

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, h = torch.nn.Linear(2, 1), torch.zeros((), requires_grad=True)
        fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        params = list(net.named_parameters())  # after a forward pass, they would be gathered
        inner, outer = h.exp() * net(torch.ones(3, 2)).pow(2).mean(), net(torch.ones(3, 2)).mean()
        with pytest.raises(TypeError, match=r"params\['bias'\] is a DTensor.*backend=bilevel_torch\.Sharded\(module\)"):
            bilevel_torch.backward(inner, outer, params, h)
    finally:
        dist.destroy_process_group()
