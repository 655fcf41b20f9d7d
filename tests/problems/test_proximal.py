"""Proximal and projected problems: against differences of re-solved problems, scikit-learn and fixed points."""

import re
import warnings
from functools import cache

import numpy as np
import pytest
from frameworks import moved, relative_error
from hypothesis import given
from hypothesis import strategies as st
from proximal_cases import Case, Distance, Quadratic

import bilevel as bl
from bilevel import projections, prox
from bilevel.spaces.tree import tree_map
from bilevel.testing import check_hypergradient

PER_ROW = np.linspace(-1.5, 0.5, 8)
GROUPS = [0, 0, 1, 2, 2, 1, 0, 1]
MATRIX = np.random.default_rng(1).standard_normal((2, 8))
CASES = {
    "l1": (bl.Proximal, prox.l1("penalty"), {"penalty": -0.5}),
    "l1, per feature": (bl.Proximal, prox.l1("penalty"), {"penalty": PER_ROW}),
    "l1, per weight": (bl.Proximal, prox.l1("penalty"), {"penalty": np.linspace(-2, 0.5, 12).reshape(6, 2)}, (6, 2)),
    "l1, groups": (bl.Proximal, prox.l1("penalty", groups=GROUPS), {"penalty": [-1.0, 0.0, -0.5]}),
    "l1, constant": (bl.Proximal, prox.l1(0.5), {}),
    "elastic net": (bl.Proximal, prox.elastic_net(), {"l1": -0.5, "l2": -1.0}),
    "elastic net, per row": (bl.Proximal, prox.elastic_net(), {"l1": np.linspace(-2, 0, 6), "l2": -1.0}, (6, 2)),
    "group lasso": (bl.Proximal, prox.group_lasso(GROUPS, "penalty"), {"penalty": 0.5}),
    "group lasso, per group": (bl.Proximal, prox.group_lasso(GROUPS, "penalty"), {"penalty": [0.9, -0.5, 1.2]}),
    "group lasso, rows": (bl.Proximal, prox.group_lasso(range(6), "penalty"), {"penalty": PER_ROW[:6] + 1}, (6, 2)),
    "total variation": (bl.Proximal, prox.total_variation("penalty"), {"penalty": -0.5}),
    "nuclear norm, tall": (bl.Proximal, prox.nuclear_norm("penalty"), {"penalty": 0.9}, (6, 4)),
    "nuclear norm, wide": (bl.Proximal, prox.nuclear_norm("penalty"), {"penalty": 0.9}, (4, 6)),
    "box": (bl.Projected, projections.box("low", "high"), {"low": -0.5, "high": np.linspace(0.2, 0.9, 8)}),
    "nonnegative": (bl.Projected, projections.nonnegative(), {}),
    "simplex": (bl.Projected, projections.simplex("radius"), {"radius": 2.0}),
    "simplex, rows": (bl.Projected, projections.simplex(), {}, (4, 5)),
    "l1 ball": (bl.Projected, projections.l1_ball("radius"), {"radius": 2.5}),
    "l1 ball, inside": (bl.Projected, projections.l1_ball("radius"), {"radius": 100.0}),
    "l2 ball": (bl.Projected, projections.l2_ball("radius"), {"radius": 1.5}),
    "l2 ball, inside": (bl.Projected, projections.l2_ball(100.0), {}),
    "affine": (bl.Projected, projections.affine(MATRIX, "b"), {"b": [1.0, -0.5]}),
}
IN_JAX = ("l1", "nuclear norm, tall", "total variation")  # it compiles each case


@cache
def case_of(name):
    return Case(*CASES[name])


@pytest.fixture(params=CASES)
def case(request):
    return case_of(request.param)


def flat(backend, tree):
    return np.concatenate([np.ravel(backend.to_numpy(tree[key])) for key in sorted(tree)])


def test_the_gradient_is_the_slope_of_the_solved_problem(backend, case, request):
    if backend.name == "jax" and request.node.callspec.params["case"] not in IN_JAX:
        pytest.skip("the products are compared with NumPy's below")
    hg = bl.hypergradient(**case.arguments(backend), solver={"name": "cg", "rtol": 1e-12})
    assert hg.info.status is bl.Status.CONVERGED
    assert hg.info.kinks == 0
    assert abs(hg.info.value_error) <= 1e-10
    assert relative_error(flat(backend, hg.grad), flat(bl.get_backend("numpy"), case.slopes)) <= 1e-6


def test_products_are_derivatives_of_the_operator(backend, case):
    """The products by v are also symmetric. NumPy has formulas, and the other frameworks differentiate `apply`."""
    rng = np.random.default_rng(2)
    v, c = 2 * rng.standard_normal((2, *case.shape))
    h, operator = case.hparams, case.operator
    given, vector = moved(backend, (v, h)), moved(backend, c)
    by_v, by_h = backend.run(_products, operator, *given, vector)
    step = 1e-6
    slopes = np.zeros(v.size)
    for i in range(v.size):
        e = np.zeros(v.size)
        e[i] = step
        high, low = (operator(v + sign * e.reshape(v.shape), h, case.step_size) for sign in (1, -1))
        slopes[i] = ((high - low) * c).sum() / (2 * step)
    assert relative_error(backend.to_numpy(by_v).ravel(), slopes) <= 1e-7
    along = (operator(v + step * c, h, case.step_size) - operator(v - step * c, h, case.step_size)) / (2 * step)
    assert relative_error(backend.to_numpy(by_v), along) <= 1e-7
    for key, x in case.settings.items():
        x = np.asarray(x)
        ends = [[{**h, key: x + sign * step * e.reshape(x.shape)} for sign in (1, -1)] for e in np.eye(x.size)]
        values = [[operator(v, end, case.step_size) for end in pair] for pair in ends]
        expected = [((high - low) * c).sum() / (2 * step) for high, low in values]
        assert relative_error(np.ravel(backend.to_numpy(by_h[key])), expected) <= 1e-7


def _products(backend, operator, v, h, c):
    at = backend.jacobian(operator, v, h, (0.7,), label="prox")
    return at.vjp_params(c), at.vjp_hparams(c) or h


def test_every_solver_agrees_with_gmres_on_the_fixed_point():
    case = case_of("group lasso, per group")
    w, h = case.params, case.hparams
    fixed = bl.FixedPoint(_Step(case), Distance())
    expected = bl.hypergradient(fixed, w, h, **case.data, solver={"name": "gmres", "rtol": 1e-12})
    for solver in (bl.CG(rtol=1e-12), bl.MINRES(rtol=1e-12), bl.Exact(), bl.Neumann(terms=2000), bl.GMRES(rtol=1e-12)):
        # A large step size makes the system of a curved g ill-conditioned.
        for step_size in (0.05, 0.7) if solver.name == "Neumann" else (0.05, 0.7, 20.0):
            problem = bl.Proximal(Quadratic(), case.operator, Distance(), step_size)
            hg = bl.hypergradient(problem, w, h, **case.data, solver=solver)
            for key in h:
                assert relative_error(hg.grad[key], expected.grad[key]) <= 1e-8, (solver, step_size)
    unrolled = bl.hypergradient(
        bl.Proximal(Quadratic(), case.operator, Distance(), 0.25), w, h, **case.data, solver=bl.Unrolled(steps=400)
    )
    assert relative_error(unrolled.grad["penalty"], expected.grad["penalty"]) <= 1e-8


class _Step:
    """One proximal step, with the derivatives of its parts."""

    def __init__(self, case):
        self.case = case

    def __call__(self, w, h, A, b):
        return self.case.operator(self._x(w, h, A, b), h, self.case.step_size)

    def _x(self, w, h, A, b):
        return w - self.case.step_size * Quadratic().grad(w, h, A, b)

    def vjp_params(self, w, h, v, A, b):
        u = self.case.operator.vjp_params(self._x(w, h, A, b), h, v, self.case.step_size)
        return u - self.case.step_size * A @ u

    def vjp_hparams(self, w, h, v, A, b):
        s, x = self.case.step_size, self._x(w, h, A, b)
        found = self.case.operator.vjp_hparams(x, h, v, s)
        return {**found, "shift": found["shift"] + s * self.case.operator.vjp_params(x, h, v, s)}


def test_float32_stays_float32(backend):
    case = case_of("group lasso")
    arguments = case.arguments(backend)
    narrow = {name: tree_map(_narrow, arguments[name]) for name in ("params", "hparams", "inner_args", "outer_args")}
    hg = bl.hypergradient(case.problem, **narrow)
    for key, x in hg.grad.items():
        assert backend.to_numpy(x).dtype == np.float32
        assert relative_error(backend.to_numpy(x), case.slopes[key]) <= 1e-4


def _narrow(leaf):
    return leaf.float() if hasattr(leaf, "float") else leaf.astype(np.float32)


def test_damping_has_the_units_of_the_hessian():
    """On the support, it is the curvature that δ/2 ‖w − w*‖² adds to the smooth objective."""
    case, damping = case_of("l1, per feature"), 0.3
    arguments = case.arguments(bl.get_backend("numpy"))
    A, b = arguments["inner_args"]
    hg = bl.hypergradient(**arguments, solver=bl.CG(damping=damping, rtol=1e-12))
    arguments["inner_args"] = (A + damping * np.eye(8), b + damping * case.params)
    expected = bl.hypergradient(**arguments, solver=bl.CG(rtol=1e-12))
    for key in case.hparams:
        assert relative_error(hg.grad[key], expected.grad[key]) <= 1e-10


def test_many_queries_equal_single_calls(backend):
    if backend.name == "jax":
        pytest.skip("the same code as in torch, and it compiles long")
    case = case_of("group lasso")
    arguments, targets = case.arguments(backend), np.random.default_rng(3).standard_normal((3, 8))
    queries = [(backend.from_numpy(target),) for target in targets]
    many = bl.hypergradients(**{**arguments, "outer_args": queries}, solver=bl.CG(rtol=1e-12))
    assert many.info.kinks.tolist() == [0, 0, 0]
    for q, query in enumerate(queries):
        one = bl.hypergradient(**{**arguments, "outer_args": query}, solver=bl.CG(rtol=1e-12))
        for key in case.hparams:
            assert relative_error(backend.to_numpy(many.grad[key][q]), backend.to_numpy(one.grad[key])) <= 1e-8
        start = tree_map(lambda row: row[q], many.adjoint)  # noqa: B023 (called immediately)
        again = bl.hypergradient(**{**arguments, "outer_args": query, "adjoint0": start})
        assert again.info.steps == 0


def test_warm_starts_and_prepared_solvers():
    arguments = case_of("l1").arguments(bl.get_backend("numpy"))
    solver = bl.WarmStart("cg")
    steps = [bl.hypergradient(**arguments, solver=solver).info.steps for _ in range(2)]
    assert steps[0] > 1
    assert steps[1] == 0
    point = {key: arguments[key] for key in ("problem", "params", "hparams", "inner_args")}
    prepared = bl.prepare(bl.Neumann(terms=500), **point)
    expected = bl.hypergradient(**arguments, solver=bl.CG(rtol=1e-12)).grad
    assert relative_error(bl.hypergradient(**arguments, solver=prepared).grad["penalty"], expected["penalty"]) <= 1e-8


def test_micro_batches_give_the_same_gradient():
    case = case_of("l1")
    arguments, (A, b) = case.arguments(bl.get_backend("numpy")), case.data["inner_args"]
    whole = bl.hypergradient(**arguments)
    arguments["inner_args"] = bl.MicroBatches([(A, b), (A, b)])
    parts = bl.hypergradient(**arguments)
    assert relative_error(parts.grad["penalty"], whole.grad["penalty"]) <= 1e-12
    arguments["inner_args"] = [(A, b), (A, b)]
    with pytest.raises(TypeError, match=r"problem with kinks or constraints needs all of the data.*MicroBatches"):
        bl.hypergradient(**arguments, solver="neumann")


def test_equal_singular_values_have_a_derivative(backend):
    """Automatic differentiation of an SVD would give nan. The third value is below the threshold."""
    rng = np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (5, 4))
    x, c, step = u @ np.diag([2.0, 2.0, 0.4]) @ v.T, rng.standard_normal((5, 4)), 1e-6
    operator = prox.nuclear_norm("penalty")
    h = {"penalty": np.asarray(0.0)}
    found, _ = backend.run(_products, operator, *moved(backend, (x, h, c)))
    slope = (operator(x + step * c, h, 0.7) - operator(x - step * c, h, 0.7)) / (2 * step)
    assert relative_error(backend.to_numpy(found), slope) <= 1e-8


@pytest.mark.parametrize("length", [1, 2, 7, 60])
@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(0.0, 10.0))
def test_total_variation_solves_its_dual(length, seed, threshold):
    """x = y − Dᵀz with |z| <= threshold, and z is at the bound where x jumps (Fenchel duality)."""
    y = np.random.default_rng(seed).standard_normal(length)
    x = prox.total_variation(threshold)(y, None)
    z = np.cumsum(x - y)
    assert abs(z[-1]) <= 1e-10
    assert (np.abs(z[:-1]) <= threshold + 1e-10).all()
    jumps = np.diff(x)
    assert np.allclose(z[:-1][jumps != 0], threshold * np.sign(jumps[jumps != 0]), atol=1e-10)


def test_projections_solve_their_problems():
    """Each result is in its set, and no point of the set is nearer (the obtuse angle of Kolmogorov's criterion)."""
    rng = np.random.default_rng(5)
    v, others = 2 * rng.standard_normal(8), rng.standard_normal((200, 8))
    simplex, ball, round_ball = projections.simplex(2.0), projections.l1_ball(2.5), projections.l2_ball(1.5)
    affine = projections.affine(MATRIX, [1.0, -0.5])
    x = simplex(v, None)
    assert x.min() >= 0
    assert np.isclose(x.sum(), 2)
    assert np.isclose(np.abs(ball(v, None)).sum(), 2.5)
    assert np.isclose(np.linalg.norm(round_ball(v, None)), 1.5)
    assert np.allclose(MATRIX @ affine(v, None), [1.0, -0.5])
    for project in (simplex, ball, round_ball, affine, projections.box(-0.5, 0.5)):
        x = project(v, None)
        assert all((project(other, None) - x) @ (v - x) <= 1e-12 for other in others)


def test_an_intercept_without_penalty():
    """`prox.separable` leaves the other entries of params free."""
    rng = np.random.default_rng(6)
    X, t = rng.standard_normal((30, 5)), rng.standard_normal(30) + 2
    problem = bl.Proximal(_WithIntercept(), prox.separable({"w": prox.l1()}), _Fit(X[:10], t[:10] + 1))
    fit = bl.proximal_fit(problem, inner_args=(X, t), gtol=1e-12)
    start, lam = {"w": np.zeros(5), "intercept": np.zeros(())}, np.asarray(-1.5)
    params = fit(lam, start)
    hg = bl.hypergradient(problem, params, lam, inner_args=(X, t), solver=bl.CG(rtol=1e-12))
    ends = [problem.outer(fit(lam + e, start), lam) for e in (1e-5, -1e-5)]
    assert relative_error(hg.grad, (ends[0] - ends[1]) / 2e-5) <= 1e-6
    assert (params["w"] == 0).any()
    with pytest.raises(ValueError, match=r"separable: there is an operator for params\['w'\], but params has \['v'\]"):
        problem.prox({"v": np.zeros(5)}, lam, 1.0)


class _WithIntercept:
    """½ mean (Xw + intercept − t)²."""

    def _errors(self, w, X, t):
        return X @ w["w"] + w["intercept"] - t

    def __call__(self, w, h, X, t):
        return 0.5 * (self._errors(w, X, t) ** 2).mean()

    def grad(self, w, h, X, t):
        e = self._errors(w, X, t)
        return {"w": X.T @ e / len(t), "intercept": e.mean()}

    def hvp(self, w, h, v, X, t):
        return self.grad(v, h, X, 0 * t)

    def cross_vjp(self, w, h, v, X, t):
        return None


class _Fit(_WithIntercept):
    """The outer objective, on its own data."""

    def __init__(self, X, t):
        self.data = (X, t)

    def __call__(self, w, h):
        return super().__call__(w, h, *self.data)

    def grad(self, w, h):
        return super().grad(w, h, *self.data), None


@pytest.mark.filterwarnings("error")
def test_the_lasso_of_scikit_learn():
    lasso = pytest.importorskip("sklearn.linear_model").Lasso
    case = case_of("l1")
    root = np.linalg.cholesky(case.data["inner_args"][0]).T
    h = case.hparams
    target = np.linalg.solve(root.T, case.data["inner_args"][1] + h["shift"])

    def fit(h, start):
        model = lasso(alpha=float(np.exp(h["penalty"])) / 8, fit_intercept=False, tol=1e-14, max_iter=100_000)
        return model.fit(root, np.linalg.solve(root.T, case.data["inner_args"][1] + h["shift"])).coef_

    assert relative_error(fit(h, target), case.params) <= 1e-6
    found = bl.minimize(case.problem, h, fit=fit, **case.data, bounds=(-3, 1), maxiter=10)
    assert found.fun < float(Distance()(case.params, h, *case.data["outer_args"]))


def test_the_check_of_users_accepts_it():
    check_hypergradient(**case_of("group lasso").arguments(bl.get_backend("numpy")), solver=bl.CG(rtol=1e-12))
    check_hypergradient(
        **case_of("box").arguments(bl.get_backend("numpy")), solver=bl.CG(rtol=1e-12), reference="finite-differences"
    )


@pytest.mark.filterwarnings("default::bilevel.InnerProblemWarning")
class TestKinks:
    """Points where the solution map has no derivative."""

    @staticmethod
    def at_threshold(backend):
        """The first entry of w* = soft(b) is at its threshold, and the third is exactly at it by rounding."""
        problem = bl.Proximal(Quadratic(), prox.l1("penalty"), Distance())
        b = np.array([1.0, 3.0, 0.5, -1.0 - 1e-16])
        h = {"shift": np.zeros(4), "penalty": np.asarray(0.0)}
        params = np.array([0.0, 2.0, 0.0, 0.0])
        point = moved(backend, {"params": params, "hparams": h, "inner_args": (np.eye(4), b), "outer_args": (b,)})
        return {"problem": problem, **point}

    def test_the_call_warns(self, backend):
        with pytest.warns(bl.InnerProblemWarning, match=r"at a kink of the proximal step.*bl\.diagnose names"):
            hg = bl.hypergradient(**self.at_threshold(backend))
        assert hg.info.kinks == 2

    def test_diagnose_names_the_entries(self):
        report = bl.diagnose(**self.at_threshold(bl.get_backend("numpy")))
        assert [finding.name for finding in report.findings] == ["at kink"]
        assert report.findings[0].what.startswith("params[0] and params[3] are at a kink")
        assert report.suggestions == ()

    def test_a_group_and_a_bound(self):
        backend = bl.get_backend("numpy")
        cases = {
            (0, 1): (bl.Proximal, prox.group_lasso([0, 0, 1, 1], 5.0), [3.0, 4.0, 6.0, 8.0], [0.0, 0.0, 3.0, 4.0]),
            (1,): (bl.Projected, projections.nonnegative(), [1.0, 0.0, -1.0, 2.0], [1.0, 0.0, 0.0, 2.0]),
        }
        for entries, (kind, operator, b, w) in cases.items():
            h, b = {"shift": np.zeros(4)}, np.array(b)
            problem, data = kind(Quadratic(), operator, Distance()), {"inner_args": (np.eye(4), b), "outer_args": (b,)}
            report = bl.diagnose(problem, np.array(w), h, **data)
            assert report.kinks == tuple(f"params[{i}]" for i in entries)
            with pytest.warns(bl.InnerProblemWarning, match="at a kink"):
                bl.hypergradients(problem, np.array(w), h, inner_args=data["inner_args"], outer_args=[(b,), (b,)])
        assert backend.name == "numpy"

    def test_regular_points_do_not_warn(self, case):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bl.hypergradient(**case.arguments(bl.get_backend("numpy")))
            float32 = tree_map(lambda x: x.astype(np.float32), {"params": case.params, "hparams": case.hparams})
            bl.hypergradient(**{**case.arguments(bl.get_backend("numpy")), **float32})


def test_nothing_to_solve_if_all_entries_are_held():
    problem = bl.Proximal(Quadratic(), prox.l1("penalty"), Distance())
    h, b = {"shift": np.ones(3), "penalty": np.asarray(5.0)}, np.array([1.0, 2.0, 3.0])
    data = {"inner_args": (np.eye(3), b), "outer_args": (b,)}
    hg = bl.hypergradient(problem, np.zeros(3), h, **data)
    assert hg.info.status is bl.Status.CONVERGED
    assert hg.grad["penalty"] == 0
    assert np.array_equal(hg.grad["shift"], 2 * h["shift"])
    report = bl.diagnose(problem, np.zeros(3), h, **data)
    assert report.ok
    assert report.suggestions == ("all entries of params are held, so there is no system to solve.",)


def test_diagnose_of_a_regular_point():
    report = bl.diagnose(**case_of("group lasso").arguments(bl.get_backend("numpy")))
    assert report.ok, str(report)
    assert report.curvature == "proximal"
    assert report.eigenvalues.smallest >= 0.5  # of A = P(H + ∂²g)P on the support
    assert "on the support" in str(report)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bl.Proximal(None, prox.l1(), Distance()), TypeError, r"Proximal\.smooth: expected a function"),
        (lambda: bl.Proximal(Quadratic(), 1.0, Distance()), TypeError, r"Proximal\.prox: .* \(v, hparams, step_size\)"),
        (lambda: bl.Projected(Quadratic(), 1.0, Distance()), TypeError, r"Projected\.project: .* \(v, hparams\)"),
        (
            lambda: bl.Proximal(Quadratic(), prox.l1(), Distance(), 0.0),
            ValueError,
            r"Proximal\.step_size: .*> 0, got 0",
        ),
        (lambda: bl.Projected(Quadratic(), abs, Distance(), "auto"), TypeError, r"Projected\.step_size"),
        (
            lambda: bl.Projected(Quadratic(), prox.separable({"w": prox.l1()}), Distance()),
            TypeError,
            r"Projected\.project: L1 is a proximal operator and no projection.* Use bl\.Proximal",
        ),
        (
            lambda: bl.Proximal(prox.l1(), Quadratic(), Distance()),
            TypeError,
            r"Proximal\.smooth: got the operator L1\. Pass .* in the order \(smooth, prox, outer\)",
        ),
        (lambda: projections.box(1.0, 0.0), ValueError, r"box: expected low <= high"),
        (lambda: projections.box(0.0, [1.0, np.nan]), ValueError, r"^high: expected a number, got \[1\.0, nan\]"),
        (lambda: projections.affine(np.ones((2, 3)), 1.0), ValueError, r"A: .* independent rows.*the rank 1"),
        (lambda: prox.l1(object()), TypeError, r"penalty: expected None .*, a string .*, got object"),
        (lambda: prox.l1(groups=[0.5]), ValueError, r"groups: expected the index of its group"),
        (lambda: prox.separable({"w": abs}), TypeError, r"separable: expected an operator of bl\.prox .* for 'w'"),
        (lambda: bl.scipy_fit(case_of("l1").problem), TypeError, r"scipy_fit .* Proximal .*use bl\.proximal_fit"),
        (
            lambda: bl.proximal_fit(bl.problems.ridge()),
            TypeError,
            r"proximal_fit .*bl\.Problem, use bl\.scipy_fit",
        ),
    ],
)
def test_errors_of_constructors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("value", [-1.0, np.nan, [0.1, -0.1]])
def test_a_constant_penalty_is_not_negative(value):
    for make, name in [
        (prox.l1, "penalty"),
        (prox.elastic_net, "l1"),
        (lambda l2: prox.elastic_net(l2=l2), "l2"),
        (lambda penalty: prox.group_lasso([0, 0, 1], penalty), "penalty"),
        (prox.nuclear_norm, "penalty"),
        (prox.total_variation, "penalty"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected numbers >= 0, got {re.escape(repr(value))}"):
            make(value)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_a_constant_radius_is_positive(value):
    for make in (projections.l1_ball, projections.l2_ball, projections.simplex):
        with pytest.raises(ValueError, match=f"^radius: expected a number > 0, got {value}"):
            make(value)


@pytest.mark.parametrize(
    ("operator", "v", "hparams", "error", "message"),
    [
        (prox.l1(), np.ones(3), np.ones(2), ValueError, r"penalty: expected shape \(\) .*, \(3,\) .*got \(2,\)"),
        (prox.l1("a"), np.ones(3), np.ones(3), TypeError, r"L1\.penalty is hparams\['a'\], but hparams is no dict"),
        (prox.l1("a"), np.ones(3), {"b": 1}, ValueError, r"hparams\['a'\], but hparams has the keys \['b'\]"),
        (prox.l1(), np.ones(3), {"b": 1}, TypeError, r'expected an array as hparams, got dict.*penalty="key"'),
        (
            prox.l1(),
            {"w": np.ones(3)},
            np.ones(()),
            TypeError,
            r"expected params to be one array.*bl\.prox\.separable",
        ),
        (prox.l1(groups=[0, 1]), np.ones(3), np.ones(2), ValueError, r"groups: expected 3 indices.*got 2"),
        (prox.group_lasso([0, 1]), np.ones(3), np.ones(()), ValueError, r"groups: expected 3 indices.*got 2"),
        (prox.nuclear_norm(1.0), np.ones(3), None, ValueError, r"nuclear_norm: expected params of shape \(m, n\)"),
        (prox.total_variation(1.0), np.ones((3, 2)), None, ValueError, r"total_variation: expected params of shape"),
        (prox.separable({"w": prox.l1()}), np.ones(3), np.ones(()), TypeError, r"expected params to be a dict"),
        (projections.simplex([1.0, 2.0]), np.ones(3), None, ValueError, r"radius: expected shape \(\), got \(2,\)"),
        (projections.l2_ball([1.0, 2.0]), np.ones(3), None, ValueError, r"radius: expected shape \(\), got \(2,\)"),
        (projections.affine(MATRIX, [1.0]), np.ones(8), None, ValueError, r"affine: A has shape \(2, 8\)"),
    ],
)
def test_errors_of_operators(operator, v, hparams, error, message):
    with pytest.raises(error, match=message):
        operator(v, hparams, 1.0)


def test_equal_operators_are_equal():
    """JAX compiles once for equal problems."""
    assert prox.l1([1.0, 2.0]) == prox.l1([1.0, 2.0])
    assert hash(projections.affine(MATRIX, "b")) == hash(projections.affine(MATRIX.copy(), "b"))
    assert projections.affine(MATRIX, "b") != projections.affine(2 * MATRIX, "b")
