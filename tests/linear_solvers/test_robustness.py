"""Laws that hold at the edges: any scale, any order of keys, any precision, and nothing silent."""

from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from frameworks import framework, relative_error, solve, symmetric
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status
from bilevel.linearization import Linearization
from bilevel.operators.linear_operator import LinearOperator

B = np.random.default_rng(0).standard_normal(8)


class TestSolvers:
    @pytest.mark.parametrize("exponent", [2, 4, 6, 8, 10])
    def test_a_definite_system_is_never_called_indefinite(self, backend, exponent):
        """CG's residual may grow by half the root of the condition number on the way."""
        d = 10.0**-exponent
        x, info = solve(backend, bl.CG(rtol=1e-3), np.diag([1.0, d]), np.array([d**0.5, 1.0]))
        assert info.status == Status.CONVERGED
        assert relative_error(x, [d**0.5, 1 / d]) <= 1e-2

    @pytest.mark.parametrize(("method", "smallest"), [(bl.CG, 1e-4), (bl.MINRES, 1e-3)])
    def test_ill_conditioning_within_reach_of_the_dtype_is_solved(self, backend, method, smallest):
        matrix, rhs = np.diag([1.0, smallest]).astype(np.float32), np.ones(2, np.float32)
        x, info = solve(backend, method(rtol=0.1), matrix, rhs)
        assert info.status == Status.CONVERGED
        assert np.linalg.norm(rhs - matrix @ x) <= 0.1 * np.linalg.norm(rhs)

    @pytest.mark.parametrize("method", [bl.CG, bl.MINRES])
    def test_the_stop_rule_is_the_larger_of_both_tolerances(self, backend, method):
        matrix, rhs = symmetric(np.geomspace(1e-2, 1, 60)), np.random.default_rng(0).standard_normal(60)
        for rtol, atol, allowed in ((0.0, 0.1, 0.1), (1e-2, 0.0, 1e-2 * np.linalg.norm(rhs)), (1e-9, 0.3, 0.3)):
            for size in (1.0, 2.0**-60):  # atol is in the units of the right-hand side, however small
                x, info = solve(backend, method(rtol=rtol, atol=atol * size), matrix, size * rhs)
                assert np.linalg.norm(size * rhs - matrix @ x) <= allowed * size
                _, stricter = solve(backend, method(rtol=rtol / 100, atol=atol * size / 100), matrix, size * rhs)
                assert stricter.steps > info.steps

    def test_a_long_solve_recomputes_its_residual(self, backend):
        """In float32 the recurrence ends an order of magnitude below the truth."""
        matrix = symmetric(np.geomspace(1, 1e-6, 100)).astype(np.float32)
        rhs = np.random.default_rng(0).standard_normal(100).astype(np.float32)
        x, info = solve(backend, bl.CG(maxiter=2000), matrix, rhs)
        true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
        rounding = np.finfo(np.float32).eps * np.linalg.norm(x)  # of a product: norm(A) = 1
        assert rounding < 0.8 * true
        assert abs(info.residual_norm - true) <= rounding

    def test_a_claim_that_a_product_refutes_is_withdrawn(self, backend):
        """In float32 the recurrence goes on to fall below a tolerance that the true residual never meets."""
        matrix = symmetric(np.geomspace(1, 1e-4, 100)).astype(np.float32)
        rhs = np.random.default_rng(0).standard_normal(100).astype(np.float32)
        x, info = solve(backend, bl.CG(maxiter=2000), matrix, rhs)
        assert info.steps < 2000
        assert info.status == Status.MAXITER
        true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
        assert true > 3e-5 * np.linalg.norm(rhs)
        assert info.residual_norm > 1e-5 * np.linalg.norm(rhs)
        # The product rounds as well, and a residual that cannot fall further is of that size: norm(A) = 1.
        assert abs(info.residual_norm - true) <= np.finfo(np.float32).eps * np.linalg.norm(x)

    def test_a_product_that_cannot_be_confirmed_is_no_solution(self):
        numpy, calls = framework("numpy"), []

        def fails_the_second_time(v):
            calls.append(1)
            return 2 * v * (np.nan if len(calls) > 1 else 1)

        for solver in (bl.CG(), bl.MINRES()):
            calls.clear()
            x, info = solver.solve(None, LinearOperator(numpy.space(B), fails_the_second_time), B, None)
            assert info.status == Status.NON_FINITE
            assert np.isnan(x).all()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("solver", [bl.CG(rtol=0.05), bl.MINRES(rtol=0.05), bl.Neumann(), bl.Exact()], ids=repr)
    def test_half_precision_solves_what_it_can(self, dtype, solver):
        torch = pytest.importorskip("torch")
        rhs = torch.tensor(B).to(getattr(torch, dtype))
        for product, exact in ((lambda v: 2 * v, B / 2), (lambda v: torch.linspace(1, 2, 8).to(v) * v, None)):
            A = LinearOperator(framework("torch").space(rhs), product)
            x, info = solver.solve(solver.init(A), A, rhs, None)
            exact = B / np.linspace(1, 2, 8) if exact is None else exact
            assert x.dtype == rhs.dtype
            assert int(info.status) == Status.CONVERGED
            assert relative_error(x.double(), exact) <= 0.1

    def test_a_zero_dimensional_weight_keeps_its_dtype(self):
        torch = pytest.importorskip("torch")
        for solver in (bl.CG(rtol=0.1), bl.MINRES(rtol=0.1), bl.Neumann(), bl.Identity(), bl.Exact()):
            rhs = torch.tensor(1.0, dtype=torch.bfloat16)
            A = LinearOperator(framework("torch").space(rhs), lambda v: 2 * v)
            x, _ = solver.solve(solver.init(A), A, rhs, None)
            assert x.dtype == torch.bfloat16


@given(order=st.permutations(["a", "b", "c"]), seed=st.integers(0, 100))
def test_the_order_of_keys_does_not_matter(order, seed):
    """Weights of the same shape, which a pairing by position would mix up without a word."""
    H, rng = symmetric(np.linspace(1, 3, 6)), np.random.default_rng(seed)

    def flat(tree):
        return np.concatenate([tree[key] for key in "abc"])

    def tree(vector, keys):
        return {key: vector["abc".index(key) * 2 :][:2] for key in keys}

    b, c = rng.standard_normal(6), rng.standard_normal(6)
    lin = Linearization(0.0, tree(b, "abc"), None, lambda v: tree(H @ flat(v), order), lambda v: c * flat(v))
    for solver in ("cg", "minres", bl.Neumann(terms=200), "exact"):
        hg = bl.hypergradient_from(lin, solver=solver, adjoint0=tree(c, order))
        assert relative_error(hg.grad, -c * linalg.solve(H, b)) <= 1e-4


def test_dicts_keep_their_kind(backend):
    array = backend.from_numpy(np.array([1.0]))
    for params in (OrderedDict(w=array), defaultdict(list, w=array)):
        lin = Linearization(array[0], params, None, lambda v: v, lambda v: v)
        hg = bl.hypergradient_from(lin)
        assert type(hg.grad) is type(params)


class TestNothingIsSilent:
    def test_an_unroll_that_drives_apart_is_flagged(self, backend):
        problem = bl.problems.quadratic(*(backend.from_numpy(a) for a in (np.diag([1.0, 10.0]), np.eye(2), np.ones(2))))
        w = backend.from_numpy(np.zeros(2))
        solver = bl.Unrolled(steps=30, step_size=0.5)
        with pytest.warns(bl.SolverWarning, match=r"Unrolled: diverged\. Its step_size"):
            hg = bl.hypergradient(problem, w, w + 0, solver=solver)
        assert hg.info.status is Status.DIVERGED
        with pytest.raises(bl.SolverError, match=r"Unrolled: diverged.* use step_size=0\.1 "):
            bl.hypergradient(problem, w, w + 0, solver=solver, on_failure="raise")

    def test_advice_on_damping_holds_for_a_solver_that_has_some(self, backend):
        H = np.diag([-2.0, 1.0])
        problem = bl.problems.quadratic(*(backend.from_numpy(a) for a in (H, np.eye(2), np.ones(2))))
        w = backend.from_numpy(np.zeros(2))
        with pytest.raises(bl.SolverError, match="raise damping above 2,"):
            bl.hypergradient(problem, w, w + 0, solver=bl.CG(damping=1.0), on_failure="raise")

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_an_outer_objective_that_is_cut_off(self, name):
        w, h = (framework(name).from_numpy(np.ones(2)) for _ in range(2))
        problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda p, q: (w**2).sum())
        with pytest.raises(ValueError, match="outer depends on neither params nor hparams"):
            bl.hypergradient(problem, w + 1, h)

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_an_inner_objective_that_is_cut_off(self, name):
        w, h = (framework(name).from_numpy(np.ones(2)) for _ in range(2))
        problem = bl.Problem(lambda p, h: ((w - h) ** 2).sum(), lambda w, h: (w * h).sum())
        with pytest.raises(ValueError, match="inner does not depend on params"):
            bl.hypergradient(problem, w + 1, h)

    def test_a_module_that_is_not_run_with_the_weights_given(self):
        torch = pytest.importorskip("torch")
        net, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
        problem = bl.Problem(
            lambda w, h: (net(x) ** 2).sum() + sum((h * p**2).sum() for p in w), lambda w, h: net(x).sum()
        )
        h = torch.ones(())
        with pytest.raises(ValueError, match="functional_call"):
            bl.hypergradient(problem, list(net.state_dict().values()), h)
        with pytest.raises(ValueError, match="functional_call"):
            bl.hypergradient(problem, list(net.parameters()), h, solver="unrolled")

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_an_accuracy_is_no_objective(self, name):
        w = framework(name).from_numpy(np.ones(2))
        problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (w > h).sum())
        with pytest.raises(TypeError, match=r"outer: expected a floating-point scalar, got .*int.* no derivative"):
            bl.hypergradient(problem, w, w + 0)

    @pytest.mark.parametrize("solver", ["cg", "exact"])
    def test_a_floating_point_flag_of_the_users_code_is_no_warning(self, solver):
        class Flagging(type(bl.problems.ridge().inner)):
            def hvp(self, *args):
                np.sqrt(np.full(3, -1.0))  # what BLAS does on some processors: finite numbers, but the flag is set
                return super().hvp(*args)

        ridge = bl.problems.ridge()
        X, y, w, h = np.eye(3), np.ones(3), np.full(3, 0.5), np.zeros(())
        flagging = bl.Problem(Flagging(*vars(ridge.inner).values()), ridge.outer)
        grads = [
            bl.hypergradient(p, w, h, inner_args=(X, y), outer_args=(X, y), solver=solver).grad
            for p in (ridge, flagging)
        ]
        assert grads[0] == grads[1] != 0

    def test_a_nan_from_a_hand_made_cross_product(self):
        lin = Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: v * np.nan)
        with pytest.raises(bl.SolverError, match=r"nan or (infinity|infinite)"):
            bl.hypergradient_from(lin)

    def test_hand_made_derivatives_without_hparams(self):
        with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
            bl.hypergradient_from(Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: None))

    def test_an_adjoint_of_another_dtype(self, backend):
        w = backend.from_numpy(np.ones(2, np.float32))
        lin = Linearization(w[0], w, None, lambda v: v, lambda v: v)
        with pytest.raises(TypeError, match=r"adjoint0 is .*float64, but grad_params .*float32"):
            bl.hypergradient_from(lin, adjoint0=backend.from_numpy(np.ones(2)))

    def test_a_warm_start_by_hand_is_used(self, backend):
        w = backend.from_numpy(np.ones(2))
        lin = Linearization(w[0], w, None, lambda v: 4 * v, lambda v: v)
        assert bl.hypergradient_from(lin, adjoint0=w / 4).info.steps == 0

    def test_no_problem(self):
        with pytest.raises(TypeError, match=r"problem: expected bl\.Problem\(inner, outer\), .*, got tuple"):
            bl.hypergradient((len, len), np.ones(1), np.ones(1))

    def test_a_generator_of_parameters(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(TypeError, match=r"params: expected an array of torch, got generator.*named_parameters"):
            bl.hypergradient(bl.problems.ridge(), torch.nn.Linear(1, 1).parameters(), torch.ones(1))

    def test_attention_without_a_second_derivative_says_what_to_do(self):
        torch = pytest.importorskip("torch")
        attend, q = torch.nn.functional.scaled_dot_product_attention, torch.ones(1, 2, 4, 8)
        problem = bl.Problem(lambda w, h: (attend(q * w, q, q * h) ** 2).sum(), lambda w, h: (w**2).sum())
        with pytest.raises(RuntimeError, match=r"differentiates twice.*SDPBackend\.MATH"):
            bl.hypergradient(problem, torch.ones(8), torch.ones(8))


class TestJaxCache:
    """What a compiled function may be used again for, and what not."""

    @pytest.fixture(autouse=True)
    def jax(self):
        return pytest.importorskip("jax")

    W = np.array([1.0, 2.0])

    def call(self, problem=None, **options):
        problem = problem or bl.Problem(lambda w, h, *_: ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())
        jax_array = framework("jax").from_numpy(self.W)
        return bl.hypergradient(problem, jax_array, jax_array + 1, **options)

    def test_one_is_not_true(self):
        problem = bl.Problem(
            lambda w, h, flag: ((w - h) ** 2).sum() * (3 if flag is True else 1), lambda w, h: (w**2).sum()
        )
        one, true = (self.call(problem, inner_args=(flag,)).adjoint for flag in (1, True))
        assert relative_error(one, 3 * np.asarray(true)) <= 1e-12

    def test_a_solver_that_changes_is_not_compiled_once_for_all(self):
        class Scaled(bl.LinearSolver):
            k = 1.0

            def solve(self, state, A, b, x0):
                return bl.Identity(self.k).solve(state, A, b, x0)

        solver = Scaled()
        first = self.call(solver=solver)
        solver.k = 5.0
        assert relative_error(self.call(solver=solver).adjoint, 5 * np.asarray(first.adjoint)) <= 1e-12

    def test_an_argument_that_changes_is_not_compiled_once_for_all(self):
        class Box:
            scale = 1.0

        box = Box()
        problem = bl.Problem(lambda w, h, box: box.scale * ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())
        first = self.call(problem, inner_args=(box,))
        box.scale = 2.0
        second = self.call(problem, inner_args=(box,))
        assert relative_error(first.adjoint, 2 * np.asarray(second.adjoint)) <= 1e-12

    def test_a_loss_with_its_own_derivative_rule(self, jax):
        @jax.custom_vjp
        def square(x):
            return x**2

        square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
        problem = bl.Problem(lambda w, h: square(w - h).sum(), lambda w, h: (w**2).sum())
        assert relative_error(self.call(problem).grad, self.call().grad) <= 1e-12

    def test_a_jitted_loss_that_ignores_hparams(self, jax):
        problem = bl.Problem(jax.jit(lambda w, h: (w**2).sum()), jax.jit(lambda w, h: (w**2).sum()))
        with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
            self.call(problem)

    def test_hparams_that_are_only_added_have_no_influence(self, jax):
        problem = bl.Problem(lambda w, h: (w**2).sum() + (h**2).sum(), lambda w, h: (w**2).sum())
        with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
            self.call(problem)
