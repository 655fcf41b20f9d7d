"""Proximal Newton's method against the conditions of optimality and scikit-learn, and `bl.newton_fit` on top of it."""

import numpy as np
import pytest
from frameworks import relative_error
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import bilevel as bl
from bilevel.problems.losses import CrossEntropy, Huber, LeastSquares, Poisson, SquaredHinge
from bilevel.search import quadratic_model
from bilevel.search.proximal_newton import LinearModel, fit

LOSSES = [LeastSquares(), CrossEntropy(), SquaredHinge(), Huber(0.5), Poisson()]


def make_model(loss, n=30, d=60, seed=0, wrap=np.asarray):
    """Return a model with more features than examples, two equal columns and a column of zeros."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    X[:, 1], X[:, 2] = X[:, 0], 0
    z = X[:, :5] @ rng.uniform(-1, 1, 5) + 0.3 * rng.standard_normal(n)
    y = z if isinstance(loss, LeastSquares | Huber) else (z > 0).astype(float)
    return LinearModel(loss, wrap(X), y, np.full(n, 1 / n))


def violation(model, w, l1, l2):
    """Return the largest distance of minus the gradient from the subdifferential, entry by entry."""
    gradient = model.gradient(model.X @ w) + l2 * w
    return max(
        abs(g + penalty * np.sign(x)) if x else max(abs(g) - penalty, 0)
        for g, x, penalty in zip(gradient, w, l1, strict=True)
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0), (0.03, 0), (0.003, 0), (0.3, 0.1), (0.003, 0.1), (0, 0.1)])
def test_the_conditions_of_optimality_hold(loss, l1, l2):
    model = make_model(loss)
    scale = np.abs(model.gradient(np.zeros(30))).max()
    one, two = np.full(60, l1 * scale), np.full(60, l2 * scale)
    found = fit(model, one, two, np.zeros(60), 1e-10 * scale, 100)
    assert found.violation <= 1e-10 * scale
    assert violation(model, found.w, one, two) == pytest.approx(found.violation, abs=1e-12)
    warm = fit(model, one, two, found.w, 1e-10 * scale, 100)
    assert warm.steps == 0


@given(seed=st.integers(0, 1000), penalties=st.lists(st.sampled_from([0.0, 0.01, 0.1]), min_size=8, max_size=8))
def test_penalties_per_feature_of_least_squares(seed, penalties):
    """Features without a penalty are among them, such as an intercept."""
    model = make_model(LeastSquares(), n=20, d=8, seed=seed)
    l1, start = np.array(penalties), np.random.default_rng(seed).standard_normal(8)
    found = fit(model, l1, np.full(8, 1e-3), start, 1e-12, 100)
    assert violation(model, found.w, l1, np.full(8, 1e-3)) <= 1e-12


@pytest.mark.parametrize("loss", [LeastSquares(), CrossEntropy()], ids=lambda loss: type(loss).__name__)
def test_systems_without_a_matrix_and_sparse_data_give_the_same(loss, monkeypatch):
    l1, l2 = np.full(60, 0.005), np.full(60, 0.01)
    dense = fit(make_model(loss), l1, l2, np.zeros(60), 1e-10, 100)
    columns = fit(make_model(loss, wrap=sparse.csc_array), l1, l2, np.zeros(60), 1e-10, 100)
    monkeypatch.setattr(quadratic_model, "LARGEST_MATRIX", 2)
    products = fit(make_model(loss, wrap=sparse.csc_array), l1, l2, np.zeros(60), 1e-10, 100)
    for other in (columns, products):
        assert other.violation <= 1e-10
        assert relative_error(other.w, dense.w) <= 1e-7
    assert 5 < np.count_nonzero(dense.w) < 60


def test_the_lasso_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = make_model(LeastSquares())
    expected = linear_model.Lasso(0.05, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(model.X, model.y).coef_
    found = fit(model, np.full(60, 0.05), np.zeros(60), np.zeros(60), 1e-12, 100).w
    assert relative_error(model.X @ found, model.X @ expected) <= 1e-7
    assert np.abs(found).sum() == pytest.approx(np.abs(expected).sum(), rel=1e-7)


def test_a_nan_ends_the_fit_and_is_reported():
    model = make_model(LeastSquares())
    model.y[0] = np.nan
    found = fit(model, np.full(60, 0.1), np.zeros(60), np.zeros(60), 1e-8, 100)
    assert np.isnan(found.violation)


class TestNewtonFit:
    @staticmethod
    def data(n=24, d=6):
        rng = np.random.default_rng(0)
        X = np.column_stack([rng.standard_normal((n, d - 1)), np.ones(n)])
        return X, (X[:, 0] + rng.standard_normal(n) > 0).astype(float), rng.integers(1, 4, n).astype(float)

    @pytest.mark.parametrize("name", ["ridge", "logistic_regression", "svm", "huber", "poisson"])
    def test_it_minimizes_the_inner_objective(self, name):
        problem, h = getattr(bl.problems, name)([0, 1, 1, 0, 2, -1]), np.array([-1.0, -3.0, -2.0])
        for data in (self.data()[:2], self.data()):
            w = bl.newton_fit(problem, inner_args=data, tol=1e-12)(h, None)
            assert np.linalg.norm(problem.inner.grad(w, h, *data)) <= 1e-11

    @pytest.mark.parametrize("name", ["ridge", "logistic_regression", "svm"])
    @pytest.mark.parametrize("largest", [1500, 0])
    def test_several_outputs(self, name, largest, monkeypatch):
        monkeypatch.setattr(quadratic_model, "LARGEST_MATRIX", largest)
        X, _, s = self.data()
        classes = np.arange(24) % 3
        y = classes if name == "logistic_regression" else np.eye(3)[classes]
        problem, h = getattr(bl.problems, name)([0, 1, 1, 0, 2, -1]), np.array([-1.0, -6.0, -2.0])
        fit = bl.newton_fit(problem, inner_args=(X, y, s), tol=1e-12)
        w = fit(h, np.zeros((6, 3)))
        assert np.linalg.norm(problem.inner.grad(w, h, X, y, s)) <= 1e-11
        v = np.random.default_rng(1).standard_normal((6, 3))
        v -= v.mean(1, keepdims=True)  # a shift of all classes is in the null space of the softmax's Hessian
        if largest:
            found = fit.precondition(problem.inner.hvp(w, h, v, X, y, s))
            assert relative_error(found - found.mean(1, keepdims=True), v) <= 1e-6

    def test_a_sparse_softmax(self):
        X = self.data(60)[0]
        y = np.digitize(X[:, 0] + 0.3 * X[:, 1], [-0.5, 0.5])
        problem, h = bl.problems.sparse_logistic([0, 1, 1, 0, 2, -1]), np.log([0.03, 0.1, 0.1])
        w = bl.newton_fit(problem, inner_args=(X, y), tol=1e-12)(h, np.zeros((6, 3)))
        l1 = np.array([0.03, 0.1, 0.1, 0.03, 0.1, 0])[:, None]
        gradient = problem.smooth.grad(w, h, X, y)
        zero = (w == 0) & (l1 > 0)
        assert 4 < zero.sum() < 14
        assert np.all(np.abs(gradient)[zero] <= np.broadcast_to(l1, w.shape)[zero])
        assert np.abs(gradient + l1 * np.sign(w))[~zero].max() <= 1e-11

    def test_the_folds_of_a_cross_validation(self):
        model_selection = pytest.importorskip("sklearn.model_selection")
        X, y, s = self.data()
        folds, problem = list(model_selection.KFold(3).split(X)), bl.problems.logistic_regression()
        cv, h = bl.problems.k_fold(problem, folds), np.full(6, -2.0)
        params = bl.newton_fit(cv, inner_args=(X, y, s), tol=1e-12)(h, None)
        for w, (train, _) in zip(params, folds, strict=True):
            assert np.linalg.norm(problem.inner.grad(w, h, X[train], y[train], s[train])) <= 1e-11
        again = bl.newton_fit(cv, inner_args=(X, y, s), tol=1e-12)(h, params)
        assert all(np.array_equal(a, b) for a, b in zip(again, params, strict=True))

    def test_float32_stays_float32(self):
        X, y = (a.astype(np.float32) for a in self.data()[:2])
        w = bl.newton_fit(bl.problems.ridge(), inner_args=(X, y))(np.zeros(6, np.float32), None)
        assert w.dtype == np.float32
        assert np.linalg.norm(bl.problems.ridge().inner.grad(w, np.zeros(6, np.float32), X, y)) <= 1e-4

    def test_a_search(self):
        X, y, _ = self.data()
        data = {"inner_args": (X[:12], y[:12]), "outer_args": (X[12:], y[12:])}
        problem = bl.problems.logistic_regression()
        fit = bl.newton_fit(problem, inner_args=data["inner_args"])
        found = bl.minimize(problem, np.zeros(6), fit=fit, bounds=(-6, 3), **data)
        assert found.success, found.message
        assert found.fun < found.history[0].value

    def test_too_few_steps_warn(self):
        X, y, _ = self.data()
        with pytest.warns(bl.SolverWarning, match=r"newton_fit stopped after 1 Newton steps.*raise maxiter or tol"):
            bl.newton_fit(bl.problems.poisson(), inner_args=(X, y), maxiter=1)(np.full(6, -3.0), None)

    def test_a_nan_is_named(self):
        X, y, _ = self.data()
        X[0, 0] = np.nan
        with pytest.warns(bl.SolverWarning, match="The gradient is not finite.*look for nan"):
            bl.newton_fit(bl.problems.ridge(), inner_args=(X, y))(np.zeros(6), None)

    def test_other_kinds_of_arguments(self):
        X, y, _ = self.data()
        quadratic = bl.problems.quadratic(np.eye(6), np.eye(6), np.ones(6))
        with pytest.raises(TypeError, match=r"for other proximal problems bl\.proximal_fit"):
            bl.newton_fit(bl.Proximal(quadratic.inner, bl.prox.l1(), quadratic.outer), inner_args=(X, y))
        with pytest.raises(TypeError, match=r"X: newton_fit expects NumPy arrays, or scipy\.sparse for X, got list"):
            bl.newton_fit(bl.problems.ridge(), inner_args=(X.tolist(), y))
        with pytest.raises(TypeError, match="y: newton_fit expects NumPy arrays"):
            bl.newton_fit(bl.problems.ridge(), inner_args=(X, y.tolist()))

    def test_other_problems_and_shapes(self):
        X, y, s = self.data()
        quadratic = bl.problems.quadratic(np.eye(2), np.eye(2), np.ones(2))
        with pytest.raises(TypeError, match=r"newton_fit: expected a ready linear model.*use bl\.scipy_fit"):
            bl.newton_fit(quadratic, inner_args=(X, y))
        for shape in ((5,), (5, 2), ()):
            with pytest.raises(ValueError, match=r"params0: newton_fit expects shape \(6,\) or \(6, k\), a row for"):
                bl.newton_fit(bl.problems.ridge(), inner_args=(X, y))(np.zeros(6), np.zeros(shape))
        with pytest.raises(ValueError, match=r"y: expected shape \(24,\), with the rows of X, got \(23,\)"):
            bl.newton_fit(bl.problems.ridge(), inner_args=(X, y[1:]))
        with pytest.raises(ValueError, match=r"sample_weight: expected shape \(24,\)"):
            bl.newton_fit(bl.problems.ridge(), inner_args=(X, y, s[1:]))
