"""Many solves at once in PyTorch: when they run together, and what happens where vmap is not supported."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

import bilevel as bl
from bilevel.backend import Backend

torch = pytest.importorskip("torch")

Q, N = 3, 4


class Cube(torch.autograd.Function):
    """x³ with two derivatives. The second reads a number, which vmap does not support."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return CubeBackward.apply(x, g)


class CubeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx, u):
        x, g = ctx.saved_tensors
        assert float(u.abs().sum()) >= 0
        return 6 * x * g * u, 3 * x**2 * u


def inner(w, h, cube):
    return (0.1 * cube(w) + (w - h) ** 2).sum()


def outer(w, h, cube):
    return torch.stack([(w[i] + w[i + 1]) ** 2 for i in range(Q)])


def at():
    return torch.linspace(0.2, 1.0, N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)


@pytest.fixture
def together(monkeypatch):
    """Note each call that takes one row after the other."""
    loops = []
    one_by_one = Backend.batched

    def noted(self, *args):
        loops.append(args)
        return one_by_one(self, *args)

    monkeypatch.setattr(Backend, "batched", noted)
    return lambda: not loops


def hypergradients(cube, solver):
    return bl.hypergradients(
        bl.Problem(inner, outer), *at(), inner_args=(cube,), outer_args=(cube,), solver=solver, on_failure="ignore"
    )


def dense():
    w, h = at()
    hessian = torch.diag(0.6 * w + 2)
    jacobian = torch.func.jacrev(lambda w: outer(w, h, None))(w)
    return jacobian @ torch.linalg.inv(hessian) * 2  # ∂²L/∂λ∂w = −2 I


SOLVERS = ["cg", "minres", "gmres", "bicgstab", "neumann", "exact", "nystrom"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_rows_run_together(together, solver):
    hg = hypergradients(lambda w: w**3, {"name": solver, "damping": 1e-9})
    assert together()
    assert torch.allclose(hg.grad, dense(), rtol=1e-4)


@pytest.mark.parametrize("solver", ["cg", "gmres"])
def test_an_operation_without_vmap_is_solved_row_by_row(together, solver):
    hg = hypergradients(Cube.apply, solver)
    assert not together()
    assert torch.allclose(hg.grad, dense(), rtol=1e-4)


def test_a_solver_that_reads_numbers_is_run_row_by_row(together):
    @dataclass(frozen=True)
    class Reading(bl.LinearSolver[None]):
        def solve(self, state, A, b, x0):
            assert float(A.space.norm(b)) > 0
            return bl.CG(rtol=1e-12).solve(None, A, b, x0)

    hg = hypergradients(lambda w: w**3, Reading())
    assert not together()
    assert torch.allclose(hg.grad, dense(), rtol=1e-10)


def test_an_error_of_a_loss_is_raised():
    def broken(v):
        raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="the user's own error"):
        hypergradients(lambda w: w**3, bl.CG(preconditioner=lambda v: broken(v)))


def test_approximate_curvature_and_equations_run_together(together):
    model = bl.Problem.from_model(
        lambda w, h, x: (x @ w, h), lambda z, y: (z[1] * (z[0] - y) ** 2).mean(), lambda w, h, t: (w - t) ** 2
    )
    x, y = torch.eye(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    w, h = at()
    hg = bl.hypergradients(model, w, h, inner_args=(x, y), outer_args=(2 * w,), solver=bl.CG(rtol=1e-12))
    assert together()
    hessian, cross = torch.diag(2 * h / N), torch.diag(2 * (w - y) / N)
    assert torch.allclose(hg.grad, -torch.diag(-2 * w) @ torch.linalg.inv(hessian) @ cross)

    step = bl.FixedPoint(lambda w, h: 0.5 * w + h, lambda w, h: w**2)
    hg = bl.hypergradients(step, 2 * h, h, solver=bl.GMRES(rtol=1e-12))
    assert together()
    assert torch.allclose(hg.grad, torch.diag(2 * 2 * h) * 2)


def test_finite_differences_run_row_by_row(together):
    problem = bl.Problem(inner, outer, curvature="finite-differences")
    args = (lambda w: w**3,)
    hg = bl.hypergradients(problem, *at(), inner_args=args, outer_args=args, on_failure="ignore")
    assert not together()
    assert torch.allclose(hg.grad, dense(), rtol=1e-4)


def test_bad_outer_values_are_named():
    def many(outer):
        bl.hypergradients(bl.Problem(lambda w, h: ((w - h) ** 2).sum(), outer), *at())

    with pytest.raises(TypeError, match=r"outer: expected a vector, got tuple\. Return the loss alone"):
        many(lambda w, h: (w, h))
    with pytest.raises(TypeError, match=r"outer: expected a floating-point vector, got torch\.int64"):
        many(lambda w, h: (w > 0).long())
    with pytest.raises(ValueError, match=r"got an array of shape \(0,\)"):
        many(lambda w, h: w[:0])
    with pytest.raises(ValueError, match="outer depends on neither params nor hparams"):
        many(lambda w, h: w.detach())


RANKS = """
import sys
import torch, torch.distributed as dist
import bilevel as bl, bilevel_torch

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
x, t = torch.randn(7, 3, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
w, h = torch.ones(3).double(), torch.ones(3).double()
problem = bl.Problem(lambda w, h, x: ((x @ w - 1) ** 2).mean() + (h * w**2).sum(), lambda w, h, t: (t @ w) ** 2)

def grads(x, backend):
    options = {"outer_args": (t,), "solver": bl.CG(rtol=1e-12), "backend": backend, "on_failure": "ignore"}
    return bl.hypergradients(problem, w, h, inner_args=(x,), **options)

own = x[:2] if rank == 0 else x[2:]
found, whole = grads(own, bilevel_torch.DataParallel(inner_samples=len(own), outer_samples=4)), grads(x, "torch")
assert torch.allclose(found.grad, whole.grad, rtol=1e-10), (found.grad, whole.grad)
assert torch.allclose(found.value, whole.value, rtol=1e-12)
assert list(found.info.steps) == list(whole.info.steps)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch is built without gloo",
)
def test_ranks_with_different_batches_agree_with_one_process(tmp_path):
    command = [sys.executable, "-c", RANKS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "group")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_an_lstm_gives_the_results_of_single_calls(dtype, context, recwarn):
    """Its vmap is slow in float32, with a warning of PyTorch's, and raises an error in float64."""
    torch.manual_seed(0)
    lstm, head = torch.nn.LSTM(3, 4, batch_first=True).to(dtype), torch.nn.Linear(4, 3).to(dtype)
    w = {name: p.detach() for name, p in lstm.named_parameters()}
    x, y = torch.randn(8, 5, 3, dtype=dtype), torch.randint(0, 3, (8,))

    def losses(w, x, y):
        z = torch.func.functional_call(lstm, w, (x,))[0][:, -1]
        return torch.nn.functional.cross_entropy(head(z), y, reduction="none")

    def weighted(w, h, x, y):
        return (h * losses(w, x, y)).mean() + sum((p**2).sum() for p in w.values())

    def queries(w, h, x, y):
        return losses(w, x, y)

    data = {"inner_args": (x, y), "outer_args": (x[:Q], y[:Q])}
    with context():
        hg = bl.hypergradients(bl.Problem(weighted, queries), w, torch.ones(8, dtype=dtype), **data)
        for q in range(Q):
            single = bl.Problem(weighted, lambda w, h, x, y, q=q: losses(w, x, y)[q])
            expected = bl.hypergradient(single, w, torch.ones(8, dtype=dtype), **data).grad
            torch.testing.assert_close(hg.grad[q], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not [str(w.message) for w in recwarn if "performance drop" in str(w.message)]
