"""Fixed points and roots: against closed forms, SciPy, and the minimum whose optimizer's step they are."""

import numpy as np
import pytest
from cases import KINDS, Affine, SquaredDistance, equation
from frameworks import DTYPES, framework, moved, namespace, relative_error, tolerance
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel.testing import check_hypergradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_affine_equation_matches_its_closed_form(backend, kind, dtype, seed):
    case = equation(kind, backend, seed=seed, dtype=dtype)
    hg = case.hypergradient(solver="exact")
    assert hg.info.status is bl.Status.CONVERGED
    assert backend.to_numpy(hg.grad).dtype == dtype
    scale = np.linalg.norm(case.direct) + np.linalg.norm(case.coupling) * np.linalg.norm(case.adjoint)
    for found, expected, size in (
        (hg.adjoint, case.adjoint, np.linalg.norm(case.adjoint)),
        (hg.grad, case.grad, scale),
    ):
        error = np.linalg.norm(backend.to_numpy(found) - expected)
        assert error <= tolerance(dtype, np.linalg.cond(case.matrix)) * size


@pytest.mark.parametrize(
    "solver",
    [
        bl.GMRES(rtol=1e-12),
        bl.BiCGStab(rtol=1e-12),
        bl.NormalCG(rtol=1e-12),
        bl.Neumann(terms=200),
        bl.Unrolled(steps=200),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_for_such_systems_agrees(backend, kind, solver):
    case = equation(kind, backend)
    if kind == "root" and isinstance(solver, bl.Neumann | bl.Unrolled):  # "auto" is a step of 1, of no use here
        solver = bl.get_solver(solver, step_size=0.3)
    assert relative_error(case.hypergradient(solver=solver).grad, case.grad) <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "exact"])
def test_products_have_the_dtype_of_what_they_are_taken_by(kind, solver):
    """NumPy promotes where data are float64 and params float32."""
    rng = np.random.default_rng(0)
    A, B, c, t = np.diag([2.0, 3.0, 4.0]), *(rng.standard_normal(shape) for shape in ((3, 2), 3, 3))
    w, h, d = np.ones(3), np.ones(2), np.zeros(2)
    narrow = bl.hypergradient(
        KINDS[kind](_Rounded(), SquaredDistance()),
        w.astype(np.float32),
        h.astype(np.float32),
        inner_args=(A, B, c),
        outer_args=(t, d),
        solver=solver,
    )
    wide = bl.hypergradient(
        KINDS[kind](Affine(), SquaredDistance()), w, h, inner_args=(A, B, c), outer_args=(t, d), solver=solver
    )
    assert narrow.grad.dtype == narrow.adjoint.dtype == np.float32
    assert relative_error(narrow.grad, wide.grad) <= 1e-4


class _Rounded(Affine):
    def __call__(self, w, *args):
        return super().__call__(w, *args).astype(w.dtype)


def test_a_step_that_does_not_contract_is_said(backend):
    case = equation("root", backend)
    with pytest.warns(bl.SolverWarning, match=r'Neumann: diverged.*does not contract at params.*solver="gmres"'):
        hg = case.hypergradient(solver=bl.Neumann(terms=50, step_size=3.0))
    assert hg.info.status is bl.Status.DIVERGED


def test_preparing_and_batches(backend):
    case = equation("fixed point", backend)
    prepared = bl.prepare("neumann", case.problem, case.params, case.hparams, inner_args=case.args["inner_args"])
    assert prepared.state == 1.0
    case.args["inner_args"] = [case.args["inner_args"]] * 2
    with pytest.raises(TypeError, match=r"inner_args is a list.*GMRES needs the same Jacobian.*bl\.MicroBatches"):
        case.hypergradient(solver="gmres")


def test_a_batch_for_each_product_is_right_in_expectation(backend):
    """The mean over all orders of three batches is the sum of Neumann's series of the mean step."""
    rng = np.random.default_rng(0)
    w, h, c, t, d = rng.standard_normal((5, 4))
    B, *A = 0.3 * rng.standard_normal((4, 4, 4))
    expected = d + B.T @ sum(np.linalg.matrix_power(sum(A).T / 3, k) for k in range(3)) @ (w - t)
    w, h, c, t, d, B, A = moved(backend, (w, h, c, t, d, B, A))
    problem = bl.FixedPoint(Affine(), SquaredDistance())
    solver = bl.Neumann(terms=2, step_size=1.0)

    def grad(batches):
        args = {"inner_args": batches, "outer_args": (t, d)}
        return backend.to_numpy(bl.hypergradient(problem, w, h, solver=solver, on_failure="ignore", **args).grad)

    orders = [grad([(A[0], B, c), (A[i], B, c), (A[j], B, c)]) for i in range(3) for j in range(3)]
    assert relative_error(np.mean(orders, 0), expected) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_normal_equations_over_micro_batches(backend, kind):
    case = equation(kind, backend)
    hg = case.hypergradient(bl.NormalCG(rtol=1e-12), inner_args=bl.MicroBatches([case.args["inner_args"]] * 2))
    assert relative_error(hg.grad, case.grad) <= 1e-9


def test_the_normal_equations_need_the_transpose():
    class Bare(Affine):
        jvp_params = property()  # as if it was not there

    case = equation("root", bl.get_backend("numpy"), function=Bare())
    with pytest.raises(TypeError, match=r"NormalCG needs products .* its transpose.*jvp_params.*NonSymmetric"):
        case.hypergradient(solver=bl.NormalCG())


def test_each_term_of_neumann_may_have_another_batch(backend):
    """Stochastic AID (Grazzi, Pontil & Salzo, AISTATS 2021). The first batch serves the cross product."""
    case = equation("fixed point", backend)
    A, B, c = case.args["inner_args"]
    case.args["inner_args"] = [(A, B, c), (0.5 * A, 2 * B, c)]
    hg = case.hypergradient(bl.Neumann(terms=3, step_size=1.0), on_failure="ignore")
    host, (t, d) = backend.to_numpy, case.args["outer_args"]
    A, B, rhs = host(A), host(B), host(case.params) - host(t)
    terms = [rhs]
    for matrix in (0.5 * A, A, 0.5 * A):
        terms.append(matrix.T @ terms[-1])
    assert relative_error(hg.grad, B.T @ sum(terms) + host(d)) <= 1e-12


def test_unrolling_forwards_is_refused(backend):
    with pytest.raises(TypeError, match=r'forward.*Only products with its transpose.*mode="reverse"'):
        equation("fixed point", backend).hypergradient(solver=bl.Unrolled(steps=2, step_size=1.0, mode="forward"))


def test_the_product_along_hparams_is_the_transpose(backend):
    if backend.name == "numpy":
        pytest.skip("objects need not bring it")
    for kind in KINDS:
        case = equation(kind, backend)
        found = case.problem.linearize(backend, case.params, case.hparams, case.args["inner_args"])
        sign = -1 if kind == "fixed point" else 1
        assert (
            relative_error(found.jvp_hparams(case.hparams), sign * case.coupling @ backend.to_numpy(case.hparams))
            <= 1e-14
        )


def test_the_identity_takes_the_last_step_alone(backend):
    """Jacobian-free backpropagation: dF/dλ ≈ ∂F/∂λ + (∂step/∂λ)ᵀ ∂F/∂w."""
    case = equation("fixed point", backend)
    assert (
        relative_error(
            case.hypergradient(solver="identity").grad, case.direct + case.coupling.T @ (case.minimum - case.target)
        )
        <= 1e-14
    )


def test_unrolling_a_fixed_point_goes_back_through_its_steps(backend):
    case = equation("fixed point", backend)
    hg = case.hypergradient(solver=bl.Unrolled(steps=4, step_size=1.0))
    powers = sum(np.linalg.matrix_power(np.eye(5) - case.matrix.T, k) for k in range(4))
    assert relative_error(hg.params, case.params) <= 1e-13
    assert relative_error(hg.grad, case.direct + case.coupling.T @ powers @ (case.minimum - case.target)) <= 1e-13


@pytest.mark.parametrize("solver", ["cg", "minres"])
@pytest.mark.parametrize("kind", KINDS)
def test_solvers_that_rely_on_symmetry_say_what_to_use(backend, kind, solver):
    with pytest.raises(TypeError, match=rf'{solver.upper()} relies on a symmetric operator.*"gmres".*"exact"'):
        equation(kind, backend).hypergradient(solver=solver)


def test_a_linearization_by_hand_may_be_nonsymmetric(backend):
    case = equation("root", backend)
    A, B, _ = case.args["inner_args"]
    lin = bl.Linearization(
        value=backend.from_numpy(np.array(0.0)),
        grad_params=backend.from_numpy(case.minimum - case.target),
        grad_hparams=None,
        hvp=bl.NonSymmetric(lambda v: A.T @ v),
        cross_vjp=lambda v: B.T @ v,
    )
    with pytest.raises(TypeError, match="CG relies on a symmetric operator"):
        bl.hypergradient_from(lin)
    assert relative_error(bl.hypergradient_from(lin, solver="exact").grad, case.grad - case.direct) <= 1e-12


def test_wrong_products_of_an_analytic_step_are_named():
    class Wrong(Affine):
        def vjp_params(self, w, h, v, A, B, c):
            return A @ v

    case = equation("fixed point", bl.get_backend("numpy"))
    problem = bl.FixedPoint(Wrong(), SquaredDistance())
    with pytest.raises(AssertionError, match="inner hvp contradicts differences of inner grad"):
        check_hypergradient(
            problem, case.params, case.hparams, solver="exact", reference="finite-differences", **case.args
        )


class TestStepsOfAnOptimizer:
    """The fixed point of gradient descent is the minimum: one hypergradient, two ways."""

    @staticmethod
    def losses(xp):
        def inner(w, h, X, y):
            return ((X @ w - y) ** 2).mean() + (xp.exp(h) * w**2).sum()

        def outer(w, h, X, y):
            return ((X @ w - y) ** 2).mean()

        return inner, outer

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_it_gives_the_hypergradient_of_the_minimum(self, name):
        backend = framework(name)
        inner, outer = self.losses(namespace(backend))
        if name == "torch":
            import torch

            def slope(w, h, X, y):
                return torch.autograd.grad(inner(w, h, X, y), w, create_graph=True)[0]
        else:
            import jax

            slope = jax.grad(inner)

        rng = np.random.default_rng(0)
        X, Xv, y, yv, h = (rng.standard_normal(s) for s in ((12, 4), (12, 4), 12, 12, 4))
        w = linalg.solve(X.T @ X / 12 + np.diag(np.exp(h)), X.T @ y / 12)
        X, Xv, y, yv, h, w = map(backend.from_numpy, (X, Xv, y, yv, h, w))
        args = {"inner_args": (X, y), "outer_args": (Xv, yv)}
        minimum = bl.hypergradient(bl.Problem(inner, outer), w, h, solver=bl.CG(rtol=1e-13), **args)
        for problem in (bl.FixedPoint(lambda w, *a: w - 0.1 * slope(w, *a), outer), bl.Root(slope, outer)):
            assert relative_error(bl.hypergradient(problem, w, h, solver="exact", **args).grad, minimum.grad) <= 1e-10


class TestTorch:
    def test_one_differentiation_is_enough(self):
        torch = pytest.importorskip("torch")

        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                y = torch.tanh(x)
                ctx.save_for_backward(y)
                return y

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                (y,) = ctx.saved_tensors
                return g * (1 - y**2)

        h = torch.full((2,), 0.3, dtype=torch.float64)
        w = h
        for _ in range(200):
            w = torch.tanh(0.5 * w + h)
        problem = bl.FixedPoint(lambda w, h: Tanh.apply(0.5 * w + h), lambda w, h: w.sum())
        s = 1 - w**2
        hg = bl.hypergradient(problem, w, h, solver="exact")
        assert relative_error(hg.grad, s / (1 - 0.5 * s)) <= 1e-12

    def test_the_step_is_run_once_and_nothing_of_the_users_is_touched(self):
        torch = pytest.importorskip("torch")
        calls = []

        def step(w, h):
            calls.append(1)
            return 0.5 * w + h

        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        h = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        w.grad = h.grad = torch.ones(3, dtype=torch.float64)
        hg = bl.hypergradient(bl.FixedPoint(step, lambda w, h: (w**2).sum()), w, h, solver="exact")
        assert relative_error(hg.grad, [4.0] * 3) <= 1e-12
        assert len(calls) == 1
        assert torch.equal(w.detach(), torch.ones(3, dtype=torch.float64))
        assert torch.equal(h.grad, torch.ones(3, dtype=torch.float64))
        assert not hg.grad.requires_grad

    def test_a_module_may_be_its_own_step(self):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3).double()
        with torch.no_grad():
            layer.weight *= 0.3
        h = dict(layer.named_parameters())
        with torch.no_grad():
            w = torch.zeros(3, dtype=torch.float64)
            for _ in range(200):
                w = layer(w).tanh()
        direct = bl.FixedPoint(lambda w, h: layer(w).tanh(), lambda w, h: (w**2).sum())
        functional = bl.FixedPoint(
            lambda w, h: torch.func.functional_call(layer, h, (w,)).tanh(), lambda w, h: (w**2).sum()
        )
        a, b = (bl.hypergradient(problem, w, h, solver="exact").grad for problem in (direct, functional))
        for name in h:
            assert a[name].abs().sum() > 0
            assert relative_error(a[name], b[name]) <= 1e-12


class TestJax:
    @pytest.mark.parametrize("kind", KINDS)
    def test_jit_and_vmap_give_the_same_as_eager(self, kind):
        jax = pytest.importorskip("jax")
        cases = [equation(kind, bl.get_backend("jax"), seed=seed) for seed in range(2)]

        def call(w, h, inner_args, outer_args):
            return bl.hypergradient(
                KINDS[kind](Affine(), SquaredDistance()),
                w,
                h,
                inner_args=inner_args,
                outer_args=outer_args,
                solver="exact",
            ).grad

        inputs = [(c.params, c.hparams, c.args["inner_args"], c.args["outer_args"]) for c in cases]
        mapped = jax.vmap(call)(*jax.tree.map(lambda *xs: jax.numpy.stack(xs), *inputs))
        for case, each, one in zip(cases, inputs, mapped, strict=True):
            assert relative_error(jax.jit(call)(*each), case.grad) <= 1e-12
            assert relative_error(one, case.grad) <= 1e-12

    def test_an_equal_problem_does_not_trace_again(self):
        pytest.importorskip("jax")
        traces, affine = [], Affine()

        def step(*args):
            traces.append(1)
            return affine(*args)

        outer, case = SquaredDistance(), equation("fixed point", bl.get_backend("jax"))
        counts = []
        for _ in range(3):
            bl.hypergradient(bl.FixedPoint(step, outer), case.params, case.hparams, solver="exact", **case.args)
            counts.append(len(traces))
        assert counts[0] > 0
        assert counts == counts[:1] * 3


def test_minimize_takes_a_fit_that_iterates(backend):
    """F = ½‖w*(λ) − t‖² with w* = (I − A)⁻¹(Bλ + c), λ as many as w: the minimum is zero."""
    case = equation("fixed point", backend, hypers=5)
    A, B, c = case.args["inner_args"]

    def fit(hparams, params):
        for _ in range(100):
            params = A @ params + B @ hparams + c
        return params

    t, _ = case.args["outer_args"]
    args = {**case.args, "outer_args": (t, 0 * t)}
    start = 0.5 * np.sum((case.minimum - case.target) ** 2)
    found = bl.minimize(case.problem, case.hparams, fit=fit, params0=case.params, solver="exact", **args)
    assert found.fun <= 1e-6 * start
