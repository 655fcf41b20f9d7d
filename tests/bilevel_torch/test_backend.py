"""What PyTorch users rely on: modules, one forward pass, one dropout mask, no graph left behind."""

import gc

import numpy as np
import pytest
from frameworks import relative_error
from scipy import linalg

import bilevel as bl
from bilevel import Status
from bilevel.operators.linear_operator import LinearOperator

torch = pytest.importorskip("torch")
bilevel_torch = pytest.importorskip("bilevel_torch")
nn, F = torch.nn, torch.nn.functional


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(24, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x, x[:, :3].argmax(1)), (xv, xv[:, :3].argmax(1))


def mlp(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *extra, nn.Linear(4, 3)).double()


def decay_problem(module):
    """One weight decay per weight, with losses that run the user's module itself or functionally."""

    def inner(params, hparams, x, y):
        penalty = sum((d.exp() * p**2).sum() for p, d in zip(params, hparams, strict=True))
        return F.cross_entropy(module(x), y) + penalty

    def outer(params, hparams, x, y):
        return F.cross_entropy(module(x), y)

    return bl.Problem(inner, outer)


def functional_problem(module):
    names = [name for name, _ in module.named_parameters()]

    def call(params, x):
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))

    def inner(params, hparams, x, y):
        penalty = sum((d.exp() * p**2).sum() for p, d in zip(params, hparams, strict=True))
        return F.cross_entropy(call(params, x), y) + penalty

    return bl.Problem(inner, lambda params, hparams, x, y: F.cross_entropy(call(params, x), y))


def decays(module, value=-2.0):
    return [torch.full_like(p, value) for p in module.parameters()]


def test_a_module_may_be_run_directly_or_functionally(data):
    module = mlp()
    args = {"inner_args": data[0], "outer_args": data[1], "solver": bl.CG(damping=1.0, rtol=1e-10)}
    direct = bl.hypergradient(decay_problem(module), list(module.parameters()), decays(module), **args)
    functional = bl.hypergradient(functional_problem(module), list(module.parameters()), decays(module), **args)
    for a, b in zip(direct.grad, functional.grad, strict=True):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_it_matches_torch_func_and_scipy(data):
    """Against a dense Hessian and mixed derivative by torch.func: another road to the same derivatives."""
    module = mlp()
    problem = functional_problem(module)
    shapes = [p.shape for p in module.parameters()]
    sizes = [p.numel() for p in module.parameters()]

    def unflat(v):
        return [part.reshape(shape) for part, shape in zip(v.split(sizes), shapes, strict=True)]

    def flat_inner(w, h):
        return problem.inner(unflat(w), unflat(h), *data[0])

    w = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    h = torch.full_like(w, -1.0)
    H = torch.func.hessian(flat_inner)(w, h).numpy() + np.eye(w.numel())
    cross = torch.func.jacrev(torch.func.grad(flat_inner), argnums=1)(w, h).numpy()
    b = torch.func.grad(lambda w: problem.outer(unflat(w), None, *data[1]))(w).numpy()
    expected = -cross.T @ linalg.solve(H, b)
    hg = bl.hypergradient(
        problem,
        unflat(w),
        unflat(h),
        inner_args=data[0],
        outer_args=data[1],
        solver=bl.CG(damping=1.0, rtol=1e-12),
    )
    assert relative_error(torch.cat([g.reshape(-1) for g in hg.grad]), expected) <= 1e-9


def test_the_losses_run_once_whatever_the_number_of_products(data):
    module, calls = mlp(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    args = {"inner_args": data[0], "outer_args": data[1]}
    hg = bl.hypergradient(
        decay_problem(module),
        list(module.parameters()),
        decays(module),
        **args,
        solver=bl.CG(damping=0.5, rtol=1e-12),
    )
    assert hg.info.steps > 5
    assert len(calls) == 2  # inner and outer


def test_one_dropout_mask_serves_all_products(data):
    """With a mask per product the operator is not linear and CG would not converge."""
    module = mlp(nn.Dropout(0.5)).train()
    args = {"inner_args": data[0], "outer_args": data[1]}
    hg = bl.hypergradient(
        decay_problem(module),
        list(module.parameters()),
        decays(module),
        **args,
        solver=bl.CG(damping=1.0, rtol=1e-10),
    )
    assert hg.info.status is Status.CONVERGED


def test_no_tensor_is_left_behind(data):
    module = mlp()
    problem, params, hparams = functional_problem(module), list(module.parameters()), decays(module)

    def live_tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(4):
        for solver in (bl.Neumann(damping=1.0), bl.CG(damping=1.0), bl.Unrolled(steps=3)):
            bl.hypergradient(problem, params, hparams, inner_args=data[0], outer_args=data[1], solver=solver)
        counts.append(live_tensors())
    assert counts[-1] == counts[1]


def test_without_the_garbage_collector_the_graph_is_freed(data):
    """No reference cycle: memory goes back when the call returns, not when Python finds the time."""
    module = mlp()
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        bl.hypergradient(
            decay_problem(module),
            list(module.parameters()),
            decays(module),
            inner_args=data[0],
            outer_args=data[1],
            solver=bl.CG(damping=1.0),
        )
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_the_random_state_is_left_alone(data):
    module = mlp()
    state = torch.get_rng_state()
    bl.hypergradient(
        decay_problem(module),
        list(module.parameters()),
        decays(module),
        inner_args=data[0],
        outer_args=data[1],
        solver=bl.Neumann(damping=1.0),
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_around_the_call_does_no_harm(data):
    module = mlp()
    args = (decay_problem(module), list(module.parameters()), decays(module))
    options = {"inner_args": data[0], "outer_args": data[1], "solver": bl.CG(damping=1.0)}
    plain = bl.hypergradient(*args, **options)
    with torch.no_grad():
        inside = bl.hypergradient(*args, **options)
    for a, b in zip(plain.grad, inside.grad, strict=True):
        assert torch.equal(a, b)


def test_params_with_a_history_are_taken_as_they_stand():
    """λ's way through the params is the solver's business: autograd must not count it again."""
    h = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    trained = h * 1.0  # a training run that kept its graph
    problem = bl.Problem(lambda w, h: 0.5 * ((w - h) ** 2).sum(), lambda w, h: 0.5 * (w**2).sum())
    hg = bl.hypergradient(problem, trained, h)
    assert relative_error(hg.grad, [2.0, 3.0]) <= 1e-12


def test_bfloat16_runs_and_stays_bfloat16():
    problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())
    w = torch.ones(4, dtype=torch.bfloat16)
    hg = bl.hypergradient(problem, w, torch.zeros(4, dtype=torch.bfloat16), solver=bl.CG(rtol=1e-2))
    assert hg.grad.dtype == torch.bfloat16
    assert relative_error(hg.grad.double(), [2.0] * 4) <= 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same(data):
    module = mlp()
    args = {"solver": bl.CG(damping=1.0, rtol=1e-10)}
    cpu = bl.hypergradient(
        decay_problem(module),
        list(module.parameters()),
        decays(module),
        inner_args=data[0],
        outer_args=data[1],
        **args,
    )
    module.cuda()
    moved = [tuple(t.cuda() for t in part) for part in data]
    gpu = bl.hypergradient(
        decay_problem(module),
        list(module.parameters()),
        decays(module),
        inner_args=moved[0],
        outer_args=moved[1],
        **args,
    )
    for a, b in zip(gpu.grad, cpu.grad, strict=True):
        assert a.is_cuda
        assert relative_error(a.cpu(), b) <= 1e-8


@pytest.mark.parametrize("check_every", [None, 8], ids=["host", "device"])
@pytest.mark.parametrize(
    "solver",
    [
        bl.CG(maxiter=3),
        bl.CG(maxiter=3, damping=0.5, preconditioner=bl.NystromPreconditioner(rank=2)),
        bl.MINRES(maxiter=3),
        bl.GMRES(restart=3),
        bl.BiCGStab(maxiter=3),
        bl.Neumann(terms=3),
        bl.Nystrom(rank=2),
        bl.Identity(),
    ],
    ids=repr,
)
def test_a_solver_that_works_in_place_leaves_what_it_was_handed(solver, check_every):
    """The operator hands out its own memory, too: that of the vector itself, where it is a multiple of the identity."""
    rhs, x0, scale = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.ones(2), torch.ones(1)], torch.ones(())
    before = [t.clone() for t in (*rhs, *x0)]

    def operator(v):
        return v if scale == 1 else [scale * t for t in v]

    A = LinearOperator(bilevel_torch.TorchSpace(rhs, check_every), operator)
    for warm in (None, x0):
        x, _ = solver.solve(solver.init(A), A, rhs, warm)
        assert all(torch.equal(a, b) for a, b in zip(before, (*rhs, *x0), strict=True))
        if not isinstance(solver, bl.Nystrom):  # a sketch of the identity is of its rank
            factor = 1 + (0.0 if isinstance(solver.damping, str) else solver.damping)
            for found, b in zip(x, rhs, strict=True):
                torch.testing.assert_close(factor * found, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_every", [None, 8], ids=["host", "device"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("beta", [1.0, torch.tensor(0.5)], ids=["one", "half"])
def test_axpby_where_is_its_definition_in_place(check_every, flag, beta):
    x, y = [torch.tensor([1.0, float("nan") if not flag else 2.0])], [torch.tensor([3.0, 4.0])]
    expected = 2 * x[0] + beta * y[0] if flag else y[0].clone()
    memory = y[0].data_ptr()
    space = bilevel_torch.TorchSpace(y, check_every)
    result = space.axpby_where(torch.tensor(flag), torch.tensor(2.0), x, y, beta)
    torch.testing.assert_close(result[0], expected)
    assert result[0].data_ptr() == memory
