"""Parameters that are sharded over ranks, with gloo: one process computes the same hypergradients."""

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch is built without gloo", allow_module_level=True)

import bilevel as bl  # noqa: E402
import bilevel_torch  # noqa: E402
from bilevel_torch.sharded import large_operations  # noqa: E402

dist = torch.distributed
PROGRAM = Path(__file__).parents[1] / "helpers" / "sharded_ranks.py"
CASES = ["cg", "minres", "neumann", "nystrom", "identity", "convnet", "tied", "checkpointed", "loop", "functions"]
CASES += ["tensor parallel", "replicated cotangent", "staying", "loop of staying", "compiled"]


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
    *others, last = start(["meshes", "checkpoint", "without_a_rank"], 4, folder)
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
@pytest.mark.parametrize("case", ["four ranks", "replicas", "two dimensions"])
def test_it_is_that_of_one_process_on_four_ranks(folder, case):
    for rank in results("meshes", 4, folder):
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
        ("nan product", r"SolverError: CG: On rank 1: The inner loss and its gradient are finite, but a product"),
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
        assert len(rank) == 15


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


def sharded_net(mesh, dtype=torch.float64):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)
    return fully_shard(net, mesh=mesh) if mesh else net


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


def by(backend, losses, params, h):
    """Return the hypergradient of two losses."""
    with backend.losses() if isinstance(backend, bilevel_torch.Sharded) else nullcontext():
        both = losses()
    solver = bl.CG(damping=1.0, rtol=1e-12)
    hg = bilevel_torch.hypergradient(*both, params, h, solver=solver, backend=backend, on_failure="ignore")
    return torch.cat([hg.grad.reshape(-1), *(whole(v).reshape(-1) for v in hg.adjoint)])


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@pytest.mark.filterwarnings("ignore::bilevel.errors.DependenceWarning")  # of the inputs
def test_a_loss_may_contain_a_gradient_by_its_inputs(mesh):
    """Its products are third derivatives of the module."""
    x, found = torch.ones(2, 3, dtype=torch.float64), []
    for sharded in (True, False):
        net = sharded_net(mesh if sharded else None)
        h = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        def losses(net=net, h=h):
            at = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(net(at).square().sum(), at, create_graph=True)
            return h * grad.square().sum() + (net(x) - 1).square().mean(), net(x).square().mean()

        backend = bilevel_torch.Sharded(net) if sharded else bilevel_torch.TorchBackend()
        found.append(by(backend, losses, list(net.parameters()), h))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


class Operations(torch.nn.Module):
    """Changes in place, a frozen weight, a bias that is added first, and a product of two parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = (torch.nn.Linear(n, 4) for n in (3, 4, 4))
        self.frozen.weight.requires_grad_(False)
        self.matrix, self.bias = torch.nn.Parameter(torch.randn(4, 2)), torch.nn.Parameter(torch.randn(2))

    def forward(self, x):
        x = self.first(x).mul_(2).relu_()
        x = torch.addmm(self.bias, torch.nn.functional.softplus(self.second(x) + self.frozen(x)), self.matrix)
        x += 1
        return x.tanh() @ (self.matrix.T @ self.matrix)


def test_operations_of_other_kinds_are_right(mesh):
    from torch.distributed.fsdp import fully_shard

    x, found = torch.ones(2, 3, dtype=torch.float64), []
    for sharded in (True, False):
        torch.manual_seed(0)
        net = Operations().double()
        h = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        backend = bilevel_torch.Sharded(fully_shard(net, mesh=mesh)) if sharded else bilevel_torch.TorchBackend()
        params = [p for p in net.parameters() if p.requires_grad]

        def losses(net=net, h=h):
            return h.exp() * (net(x) - 1).square().mean(), net(x).square().mean()

        found.append(by(backend, losses, params, h))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_autocast_applies_in_products(mesh):
    net, x, found = sharded_net(mesh, torch.float32), torch.randn(6, 3), []
    params, backend = list(net.parameters()), bilevel_torch.Sharded(net)
    for enabled in (True, False):
        with backend.losses(), torch.autocast("cpu", torch.bfloat16, enabled):
            inner = (net(x) - 1).square().mean()
        at = backend.inner_of(inner, params, torch.zeros((), requires_grad=True))
        with torch.no_grad():
            product = at.vjp_params([torch.ones_like(p) for p in params])
        found.append(torch.cat([whole(t).reshape(-1) for t in product]))
    assert 0 < (found[0] - found[1]).norm() < 2**-6 * found[1].norm()  # four roundings to bfloat16


def test_an_error_in_a_product_leaves_nothing_behind(mesh, monkeypatch):
    """A product keeps a part of a gradient until its end."""
    net, x = sharded_net(mesh), torch.ones(2, 3, dtype=torch.float64)
    params, backend = list(net.parameters()), bilevel_torch.Sharded(net)
    with backend.losses():
        inner = net(x).square().mean()
    at = backend.inner_of(inner, params, torch.zeros((), requires_grad=True))
    v = [torch.ones_like(p) for p in params]
    with torch.no_grad():
        expected = at.vjp_params(v)

        def fail(*_):
            raise MemoryError("no memory for a test")

        with monkeypatch.context() as patch:
            patch.setattr(large_operations._Operation, "gradients", fail)
            with pytest.raises(MemoryError):
                at.vjp_params(v)
        again = at.vjp_params(v)
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(again, expected, strict=True))


def test_a_sharded_parameter_needs_the_backend(mesh):
    net, h = sharded_net(mesh), torch.zeros((), dtype=torch.float64, requires_grad=True)
    train = bilevel_torch.implicit_minimizer(lambda w, h, start: (h * w - start).sum())(lambda h, start: start)
    with pytest.raises(TypeError, match=r"is a DTensor.*Other functions need whole tensors"):
        train(h, net.get_parameter("0.weight"))


def test_gathered_parameters_need_the_backend(mesh):
    """They are plain tensors. With one rank, they may have the memory of DTensors, or none."""
    from torch.distributed.fsdp import fully_shard

    net, h = sharded_net(None), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fully_shard(net[0], mesh=mesh)
    x = torch.ones(2, 3, dtype=torch.float64)
    inner, outer = h * (net(x) - 1).square().mean(), net(x).square().mean()
    gathered = list(net.parameters())
    with pytest.raises(ValueError, match=r"params\[0\] has no memory: the hooks of fully_shard.*Sharded\(module\)"):
        bilevel_torch.backward(inner, outer, gathered, h)
    net = sharded_net(mesh)
    loss = sum(p.square().sum() for p in net.parameters()).full_tensor()
    copies = [p.full_tensor().detach().requires_grad_() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"was computed with another form of params\[.\].*Sharded\(module\)"):
        bilevel_torch.backward(h * loss, loss, copies, h)


def test_a_sum_of_both_kinds_of_parameters_gets_advice(mesh):
    from torch.distributed.fsdp import fully_shard

    net, h = sharded_net(None), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fully_shard(net[0], mesh=mesh)
    backend, params = bilevel_torch.Sharded(net), list(net.parameters())[:3]  # a tensor of one entry counts as a number
    with backend.losses():
        loss = sum(p.square().sum() for p in params).full_tensor()
    with pytest.raises(RuntimeError, match=r"sum each kind by itself, and convert the sum of the DTensors"):
        bilevel_torch.backward(h * loss, loss, params, h, backend=backend)
    with pytest.raises(RuntimeError, match=r"sum each kind by itself"), backend.losses():
        torch.nn.utils.parameters_to_vector(params)
    with backend.losses():
        loss = sum(whole(p.square().sum()) for p in params)
    hg = bilevel_torch.hypergradient(h.exp() * loss, loss, params, h, backend=backend, on_failure="ignore")
    expected = 2 * sum(float(whole(p.detach().square().sum())) for p in params)  # dw/dh = -H⁻¹ ∂²L/∂w∂h = -w
    assert float(hg.grad) == pytest.approx(-expected, rel=1e-5)


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
