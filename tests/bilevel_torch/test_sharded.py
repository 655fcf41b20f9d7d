"""Parameters that are sharded over ranks, with gloo: one process computes the same hypergradients."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)

import bilevel as bl  # noqa: E402
import bilevel_torch  # noqa: E402

dist = torch.distributed
PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_ranks.py"
CASES = ["cg", "minres", "neumann", "nystrom", "identity", "convnet", "tied", "checkpointed", "loop", "functions"]
CASES += ["tensor parallel", "replicated cotangent", "resharded late", "compiled"]


def start(functions, world, folder):
    """Start the ranks of a program, and return the processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen([sys.executable, PROGRAM, str(rank), str(world), folder, *functions], env=environment)
        for rank in range(world)
    ]


def run(functions, world, folder):
    """Run functions of the program on all ranks."""
    for process in start(functions, world, folder):
        assert process.wait(240) == 0


def results(what, world, folder):
    """Return the results of a function, by rank."""
    return [torch.load(folder / f"{what}-{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all functions of two ranks in the same processes: PyTorch takes long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    *others, last = start(["checkpoint", "without_a_rank"], 4, folder)
    assert last.wait(240) == -signal.SIGKILL
    assert [process.wait(60) for process in others] == [0, 0, 0]
    run(["results", "checkpoint", "mishaps"], 2, folder)
    return folder


@pytest.fixture(scope="module")
def errors(folder):
    return results("results", 2, folder)


@pytest.fixture(scope="module")
def said(folder):
    return results("mishaps", 2, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_one_process(errors, case):
    """With uneven shares of the data, and hyperparameters that are replicated, per example, and sharded."""
    for rank in errors:
        assert rank[case] <= 1e-10


@pytest.mark.slow
def test_a_mixed_precision_policy_applies(errors):
    for rank in errors:
        assert 1e-12 < rank["mixed precision"] < 1e-5  # parameters in float32, all else in float64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("outside", r"ValueError: outer_loss was computed with the gathered parameter .*with backend\.losses\(\)"),
        ("outside, no penalty", r"ValueError: outer_loss was computed with the gathered .*would be of one rank"),
        ("no backend", r"TypeError: params\['0\.bias'\] is a DTensor.*bilevel_torch\.Sharded"),
        ("nan", r"SolverError: CG: On rank 1: The inner loss is nan or infinite"),
        ("nan gradient", r"SolverError: CG: On rank 1: The inner loss is finite, but its gradient is nan"),
        ("solver", r"ValueError: Sharded: the solver, its options.* differ .*: rank 1 .*damping=(4|5)\.0"),
        ("decay", r"ValueError: Sharded: hparams are not the same on all ranks: rank 1"),
        ("counts", r"ValueError: Sharded\.inner_samples: only some ranks give it: rank 1"),
        ("exact", r"TypeError: Sharded: a solver needs the whole matrix.*\"cg\""),
        (
            "changed",
            r"RuntimeError: outer_loss: a parameter has changed.* on rank 0 and rank 1\. Compute the losses again",
        ),
        ("mixture", r"ValueError: inner_loss is a DTensor, but .* one rank. Convert penalties.*full_tensor\(\)"),
        ("parts", r"ValueError: inner_loss contains a part of a sharded tensor, from to_local\(\).*Use full_tensor"),
        ("part of the module", r"ValueError: outer_loss was computed with the gathered .* the whole module"),
        ("diagnose", r"TypeError: Sharded: diagnose is not supported"),
    ],
)
def test_every_rank_gets_the_error(said, case, message):
    for rank in said:
        assert re.match(message, rank[case])
        assert len(rank) == 14


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(folder):
    """Also ranks that wait for a rank that lives: gloo does not tell them that another one has died."""
    for rank in range(3):
        said = torch.load(folder / f"without_a_rank-4-{rank}.pt")
        assert said.startswith("RuntimeError: Sharded: no answer from rank 3 in 1 s. It has died")


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_is_loaded_by_two(folder):
    """With the two vectors of a `WarmStart` that extrapolates."""
    saved, _ = torch.load(folder / "checkpoint-4-0.pt")
    for loaded, steps in results("checkpoint", 2, folder):
        for name, tensors in saved.items():
            assert all(torch.equal(loaded[name][key], t) for key, t in tensors.items())
        assert steps == 0


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_net(mesh):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    return fully_shard(net, mesh=mesh)


def test_the_module_is_as_before_after_the_context(mesh):
    net, x = sharded_net(mesh), torch.ones(2, 3, dtype=torch.float64)
    before = [(type(part), dict(part._forward_hooks), dict(part._forward_pre_hooks)) for part in net.modules()]
    backend = bilevel_torch.Sharded(net)
    with backend.losses():
        inside = net(x)
        assert type(net[0].weight) is torch.Tensor  # gathered
        assert type(dict(net.named_parameters())["0.weight"]).__name__ == "DTensor"
    assert before == [(type(p), dict(p._forward_hooks), dict(p._forward_pre_hooks)) for p in net.modules()]
    with pytest.raises(ZeroDivisionError), backend.losses():
        raise ZeroDivisionError
    assert before == [(type(p), dict(p._forward_hooks), dict(p._forward_pre_hooks)) for p in net.modules()]
    assert torch.equal(net(x), inside)


def test_the_loss_may_read_a_weight_of_the_module(mesh):
    """It is the whole weight, as in a module that is not sharded."""
    net, h = sharded_net(mesh), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    backend, x = bilevel_torch.Sharded(net), torch.ones(2, 3, dtype=torch.float64)
    stored, grads = net.get_parameter("0.weight"), []
    for penalty in (
        lambda: net[0].weight.square().sum(),
        lambda: stored.square().sum().full_tensor(),
    ):
        with backend.losses():
            inner, outer = (net(x) - 1).square().mean() + h * penalty(), net(x).square().mean()
        solver = bl.Neumann(terms=5, damping=10.0)
        hg = bilevel_torch.hypergradient(
            inner, outer, net.parameters(), h, solver=solver, backend=backend, on_failure="ignore"
        )
        grads.append(float(hg.grad))
    assert grads[0] == pytest.approx(grads[1], rel=1e-12)


def test_a_sharded_parameter_needs_the_backend(mesh):
    net, h = sharded_net(mesh), torch.zeros((), dtype=torch.float64, requires_grad=True)
    train = bilevel_torch.implicit_minimizer(lambda w, h, start: (h * w - start).sum())(lambda h, start: start)
    with pytest.raises(TypeError, match=r"is a DTensor.*Other functions need whole tensors"):
        train(h, net.get_parameter("0.weight"))


def test_a_mesh_of_some_ranks_is_refused(mesh, monkeypatch):
    weight = torch.distributed.tensor.distribute_tensor(torch.ones(2), mesh).requires_grad_()
    backend = bilevel_torch.Sharded()
    monkeypatch.setattr(backend, "ranks", 2)
    loss = weight.sum().full_tensor()
    with pytest.raises(ValueError, match=r"params is on a mesh of 1 of 2 ranks"):
        bilevel_torch.backward(loss, loss, weight, torch.ones(1, requires_grad=True), backend=backend)


@pytest.mark.parametrize("wrong", [torch.nn.Linear, iter(()), 3])
def test_wrong_arguments_are_named(mesh, wrong):
    with pytest.raises(TypeError, match="Sharded: expected the module that computes the losses, got"):
        bilevel_torch.Sharded(wrong)
    with pytest.raises(ValueError, match=r"Sharded\.inner_samples: expected a number >= 0, got '4'"):
        bilevel_torch.Sharded(inner_samples="4")
