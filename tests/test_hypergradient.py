"""The hypergradient against closed forms, on every backend."""

import re
import sys
import warnings

import numpy as np
import pytest
from cases import diagonal, quadratic
from frameworks import DTYPES, framework, installed, relative_error, tolerance
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status

seeds = st.integers(0, 2**32 - 1)


ACCURATE = [bl.CG(rtol=1e-6), bl.MINRES(rtol=1e-6), bl.GMRES(rtol=1e-6), bl.Neumann(terms=400), bl.Exact()]


@pytest.mark.parametrize("solver", ACCURATE, ids=lambda s: type(s).__name__)
def test_every_solver_reaches_the_closed_form_in_float32(backend, solver):
    """In float64, and by unrolling, the suites of `bilevel.testing` see to it."""
    case = quadratic(backend, dtype=np.float32)
    hg = case.hypergradient(solver)
    assert relative_error(backend.to_numpy(hg.grad), case.grad) <= tolerance(np.float32, condition=40)
    assert relative_error(backend.to_numpy(hg.adjoint), case.adjoint) <= tolerance(np.float32, condition=40)
    assert relative_error(backend.to_host(hg.value), case.value) <= tolerance(np.float32)
    assert backend.to_numpy(hg.grad).dtype == np.float32
    assert hg.info.status is Status.CONVERGED


@given(seed=seeds, weights=st.sampled_from([1, 3, 8]), hypers=st.sampled_from([1, 5]))
def test_backends_agree_with_the_closed_form_anywhere(backend, seed, weights, hypers):
    case = quadratic(backend, np.linspace(1, 4, weights), hypers, seed=seed, away=1.0, as_data=True)
    hg = case.hypergradient({"name": "cg", "rtol": 1e-12})
    assert relative_error(backend.to_numpy(hg.grad), case.grad) <= 1e-9


def test_a_warm_start_saves_all_steps(backend):
    case = quadratic(backend)
    first = case.hypergradient({"name": "cg", "rtol": 1e-10})
    again = case.hypergradient(adjoint0=first.adjoint)
    assert first.info.steps > 0
    assert again.info.steps == 0
    assert relative_error(backend.to_numpy(again.grad), case.grad) <= 1e-9


def test_eager_info_is_plain_python(backend):
    case = quadratic(backend)
    info = case.hypergradient().info
    assert isinstance(info.steps, int)
    assert isinstance(info.residual_norm, float)
    assert isinstance(info.status, Status)


def test_a_linearization_filled_by_hand_gives_the_same(backend):
    case = quadratic(backend)
    outer = backend.outer(case.problem.outer, case.params, case.hparams, case.args.get("outer_args", ()))
    at = case.problem.linearize(backend, case.params, case.hparams, case.args.get("inner_args", ()))
    by_hand = bl.hypergradient_from(bl.Linearization(*outer[:3], at.vjp_params, at.vjp_hparams), solver="exact")
    assert relative_error(backend.to_numpy(by_hand.grad), case.grad) <= 1e-12
    assert by_hand.params is None


@pytest.mark.parametrize("by_hand", [False, True], ids=["problem", "by hand"])
@pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "gmres", "bicgstab", "nystrom", "exact", "identity"])
def test_derivatives_have_the_dtype_of_what_they_are_taken_by(solver, by_hand):
    """NumPy promotes where data are float64 and params float32; the adjoint must do as the next warm start."""
    rng = np.random.default_rng(0)
    X, y, w = rng.standard_normal((9, 3)), rng.standard_normal(9), rng.standard_normal(3)
    problem, args = bl.problems.ridge(), {"inner_args": (X, y), "outer_args": (X, y)}

    def hypergradient(w, adjoint0=None):
        if not by_hand:
            return bl.hypergradient(problem, w, np.zeros(3), **args, solver=solver, adjoint0=adjoint0)
        residual = X.T @ (X @ w - y) / 9
        hessian = X.T @ X / 9 + np.eye(3)
        lin = bl.Linearization(0.0, residual.astype(w.dtype), None, lambda v: hessian @ v, lambda v: w * v)
        return bl.hypergradient_from(lin, solver=solver, adjoint0=adjoint0)

    expected, hg = hypergradient(w), hypergradient(w.astype(np.float32))
    assert hg.adjoint.dtype == np.float32
    assert relative_error(hg.grad, expected.grad) <= 1e-4
    hypergradient(w.astype(np.float32), hg.adjoint)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_trees_of_params_and_hparams_are_nested_freely(name):
    backend = framework(name)
    rng = np.random.default_rng(0)
    X, y = backend.from_numpy(rng.standard_normal((9, 3))), backend.from_numpy(rng.standard_normal(9))
    params = {"layers": [backend.from_numpy(rng.standard_normal(3)), (backend.from_numpy(np.array(0.5)),)]}
    hparams = ({"decay": backend.from_numpy(np.zeros(3))}, [backend.from_numpy(np.array(-1.0))])

    def inner(p, h, X, y):
        w, (bias,) = p["layers"]
        decays, (bias_decay,) = h[0]["decay"], h[1]
        penalty = ((w - 1) ** 2 * decays**2).sum() + (w**2).sum() + (1 + bias_decay**2) * bias**2
        return ((X @ w + bias - y) ** 2).sum() + penalty

    def outer(p, h, X, y):
        return ((X @ p["layers"][0] + p["layers"][1][0] - 2 * y) ** 2).sum()

    hg = bl.hypergradient(bl.Problem(inner, outer), params, hparams, inner_args=(X, y), outer_args=(X, y))
    assert isinstance(hg.grad, tuple)
    assert hg.grad[0]["decay"].shape == (3,)
    assert hg.grad[1][0].shape == ()
    assert hg.adjoint["layers"][1][0].shape == ()


HPARAMS = {"shared": (), "feature": (5,), "weight": None, "groups": (2,)}


class TestModels:
    """The ready problems: analytic (numpy) against automatic derivatives, ridge in closed form, what they refuse."""

    @staticmethod
    def data(kind, seed=0):
        rng = np.random.default_rng(seed)
        X, Xv = rng.standard_normal((30, 5)), rng.standard_normal((20, 5))
        if kind == "ridge":
            return (X, rng.standard_normal(30)), (Xv, rng.standard_normal(20)), rng.standard_normal(5)
        if kind == "ridge with three targets":
            return (X, rng.standard_normal((30, 3))), (Xv, rng.standard_normal((20, 3))), rng.standard_normal((5, 3))
        if kind == "logistic_regression of two classes":
            return (X, rng.integers(0, 2, 30)), (Xv, rng.integers(0, 2, 20)), rng.standard_normal(5)
        return (X, rng.integers(0, 3, 30)), (Xv, rng.integers(0, 3, 20)), rng.standard_normal((5, 3))

    @pytest.mark.parametrize(
        "kind", ["ridge", "ridge with three targets", "logistic_regression", "logistic_regression of two classes"]
    )
    @pytest.mark.parametrize("penalty", HPARAMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_analytic_and_automatic_derivatives_agree(self, kind, penalty, dtype):
        train, val, w = self.data(kind)
        shape = HPARAMS[penalty] if penalty != "weight" else w.shape
        hparams = np.random.default_rng(1).standard_normal(shape)
        problem = getattr(bl.problems, kind.split()[0])(groups=[0, 1, 1, 0, 1] if penalty == "groups" else None)
        grads = {}
        for name, backend in installed().items():

            def move(a, backend=backend):
                return backend.from_numpy(a if a.dtype.kind == "i" else a.astype(dtype))

            hg = bl.hypergradient(
                problem,
                move(w),
                move(np.asarray(hparams)),
                inner_args=tuple(map(move, train)),
                outer_args=tuple(map(move, val)),
                solver="exact",
            )
            grads[name] = backend.to_numpy(hg.grad)
            assert grads[name].shape == shape
        if len(grads) == 1:
            pytest.skip("neither torch nor jax is installed")
        for name in grads:
            assert relative_error(grads[name], grads["numpy"]) <= tolerance(dtype, condition=20), name

    @given(seed=seeds, weights=st.sampled_from([1, 4]), hypers=st.sampled_from([1, 4]))
    def test_the_quadratic_matches_its_closed_form(self, seed, weights, hypers):
        """Square couplings too, where a transposed one would have the right shape."""
        numpy = framework("numpy")
        case = quadratic(numpy, np.linspace(1, 4, weights), hypers, seed=seed)
        hg = case.hypergradient("exact")
        assert relative_error(hg.grad, case.grad) <= 1e-10
        assert relative_error(hg.value, case.value) <= 1e-12
        w = case.problem.inner.grad(case.params, case.hparams)
        assert np.linalg.norm(w) <= 1e-10

    @given(seed=seeds, hypers=st.sampled_from(["shared", "feature", "groups"]))
    def test_ridge_matches_its_closed_form(self, seed, hypers):
        (X, y), (Xv, yv), _ = self.data("ridge", seed)
        groups = np.array([0, 1, 1, 0, 1])
        lam = np.random.default_rng(seed).uniform(-3, 1, HPARAMS[hypers])
        spread = {"shared": lambda a: np.full(5, a), "feature": lambda a: a, "groups": lambda a: a[groups]}[hypers]
        penalties = np.exp(spread(lam))
        H = X.T @ X / 30 + np.diag(penalties)
        w = linalg.solve(H, X.T @ y / 30)
        per_feature = -penalties * w * linalg.solve(H, Xv.T @ (Xv @ w - yv) / 20)
        gathered = {
            "shared": per_feature.sum(),
            "feature": per_feature,
            "groups": np.array([per_feature[groups == g].sum() for g in (0, 1)]),
        }[hypers]
        problem = bl.problems.ridge(groups=groups if hypers == "groups" else None)
        hg = bl.hypergradient(
            problem,
            w,
            np.asarray(lam),
            inner_args=(X, y),
            outer_args=(Xv, yv),
            solver={"name": "cg", "rtol": 1e-12},
        )
        assert relative_error(hg.grad, gathered) <= 1e-9

    def test_two_classes_are_softmax_with_the_first_logit_zero(self, backend):
        (X, y), _, w = self.data("logistic_regression of two classes")
        problem, none = bl.problems.logistic_regression(), backend.from_numpy(np.full(5, -800.0))  # exp(-800) is zero
        losses = [
            backend.to_host(problem.inner(backend.from_numpy(params), none, *map(backend.from_numpy, (X, t))))
            for params, t in ((np.stack([0 * w, w], 1), y), (w, y), (w, 2 * y - 1), (w, y.astype(float)))
        ]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)

    @pytest.mark.parametrize("kind", ["logistic_regression", "logistic_regression of two classes"])
    def test_sparse_features_give_the_same(self, kind):
        from scipy import sparse

        train, val, w = self.data(kind)
        problem = bl.problems.logistic_regression()
        dense, sparse_ = (
            bl.hypergradient(
                problem,
                w,
                np.zeros(5),
                inner_args=(wrap(train[0]), train[1]),
                outer_args=(wrap(val[0]), val[1]),
            )
            for wrap in (np.asarray, sparse.csr_array)
        )
        assert relative_error(sparse_.grad, dense.grad) <= 1e-12

    def test_penalties_of_the_wrong_shape(self):
        data = {"inner_args": (np.eye(2), np.ones(2)), "outer_args": (np.eye(2), np.ones(2))}
        with pytest.raises(ValueError, match=r"log penalties of shape \(\) \(shared\), \(2,\) .*got \(3,\)"):
            bl.hypergradient(bl.problems.ridge(), np.ones(2), np.ones(3), **data)

    def test_penalties_that_are_no_array(self):
        data = {"inner_args": (np.eye(2), np.ones(2)), "outer_args": (np.eye(2), np.ones(2))}
        with pytest.raises(TypeError, match="hparams: expected one array of log penalties, got dict"):
            bl.hypergradient(bl.problems.ridge(), np.ones(2), {"a": np.ones(2)}, **data)

    @pytest.mark.parametrize("problem", [bl.problems.ridge(), bl.problems.logistic_regression()], ids=["ridge", "log"])
    @pytest.mark.parametrize("role", ["inner_args", "outer_args"])
    @pytest.mark.parametrize("cut", [np.s_[:, None], np.s_[:1]], ids=["column", "one"])
    def test_targets_that_would_broadcast(self, backend, problem, role, cut):
        X, y, w, h = map(backend.from_numpy, (np.ones((4, 3)), np.ones(4), np.ones(3), np.ones(3)))
        data = {"inner_args": (X, y), "outer_args": (X, y), role: (X, y[cut])}
        with pytest.raises(ValueError, match=r"y: expected shape \(4,\), with the rows of X, got \((4, 1|1,)\)"):
            bl.hypergradient(problem, w, h, **data)

    @pytest.mark.parametrize("problem", [bl.problems.ridge(), bl.problems.logistic_regression()], ids=["ridge", "log"])
    @pytest.mark.parametrize("shape", [(1, 3), (2,), (), (3, 2, 1)], ids=str)
    def test_weights_that_are_not_those_of_the_features(self, backend, problem, shape):
        X, y, w, h = map(backend.from_numpy, (np.ones((4, 3)), np.ones(4), np.ones(shape), np.ones(())))
        data = {"inner_args": (X, y), "outer_args": (X, y)}
        with pytest.raises(
            ValueError, match=rf"params: expected shape \(3,\) .*got {re.escape(str(shape))}.*coef_\[0\]"
        ):
            bl.hypergradient(problem, w, h, **data)


def test_float32_stays_float32_throughout(backend):
    case = quadratic(backend, dtype=np.float32)
    for solver in ("identity", "neumann", "cg", "minres", "exact", "unrolled"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.SolverWarning)
            hg = case.hypergradient(solver)
        for tree in (hg.grad, hg.adjoint, hg.value, hg.params):
            assert backend.to_numpy(tree).dtype == np.float32


class Counted:
    """A backend that counts products and evaluations, wherever they run."""

    def __init__(self, backend):
        self.products, self.evaluations = [], []

        def count(log):
            if backend.name == "jax":
                sys.modules["jax"].debug.callback(lambda: log.append(1))
            else:
                log.append(1)

        def product(function):
            return lambda v: count(self.products) or function(v)

        class Counting(type(backend)):
            def inner(_, *args):
                found = super().inner(*args)
                count(self.evaluations)
                return found._replace(vjp_params=product(found.vjp_params))

            def outer(_, *args, **options):
                count(self.evaluations)
                return super().outer(*args, **options)

        self.backend = Counting()

    def numbers(self, *case, **options):
        self.products.clear()
        self.evaluations.clear()
        bl.hypergradient(*case, backend=self.backend, **options)
        if self.backend.name == "jax":
            sys.modules["jax"].effects_barrier()
        return len(self.products), len(self.evaluations)


@pytest.mark.parametrize(
    "solver", [bl.CG(damping=0.0), bl.CG(maxiter=1), bl.Neumann(step_size=1.0), bl.MINRES(maxiter=2)], ids=repr
)
def test_a_warning_takes_no_product_and_no_evaluation(backend, solver):
    case, counted = diagonal([-1.0, 2.0, 4.0], backend), Counted(backend)
    quiet = counted.numbers(*case, solver=solver, on_failure="ignore")
    with pytest.warns(bl.SolverWarning):
        assert counted.numbers(*case, solver=solver) == quiet
    assert quiet[1] == 2


def test_info_as_numbers_for_a_logger(backend):
    info = quadratic(backend, away=0.1).hypergradient().info
    numbers = info.as_dict("inner/")
    assert set(numbers) == {f"inner/{name}" for name in (*info._fields, "converged")}
    assert all(type(number) in (int, float) for number in numbers.values())
    assert numbers["inner/converged"] == 1
    case = quadratic(backend, away=0.1)
    slope = case.matrix @ (backend.to_numpy(case.params) - case.minimum)
    assert numbers["inner/inner_grad_norm"] == pytest.approx(np.linalg.norm(slope), rel=1e-9)
