"""`bl.diagnose` finds a kink or a bound that holds the minimum."""

from dataclasses import dataclass

import numpy as np
import pytest
from cases import quadratic
from frameworks import framework, moved, namespace
from reports import names, text, words
from scipy.optimize import nnls

import bilevel as bl

autodiff = pytest.mark.parametrize("name", ["torch", "jax"])


def regression():
    """Correlated features, with a sparse truth: X, y, X_val, y_val."""
    rng = np.random.default_rng(0)
    X = 0.4 * rng.standard_normal((60, 6)) + rng.standard_normal((60, 1))
    X_val, truth = rng.standard_normal((40, 6)), np.array([2.0, -1, 0, 0, 0, 0])
    return X, X @ truth + 0.3 * rng.standard_normal(60), X_val, X_val @ truth


@dataclass(frozen=True)
class Lasso:
    """½ mean (Xw − y)² + exp(λ) ‖w‖₁, with analytic derivatives where they exist."""

    def __call__(self, w, h, X, y, xp=np):
        return 0.5 * ((X @ w - y) ** 2).mean() + xp.exp(h) * abs(w).sum()

    def grad(self, w, h, X, y):
        return X.T @ (X @ w - y) / len(y) + np.exp(h) * np.sign(w)

    def hvp(self, w, h, v, X, y):
        return X.T @ (X @ v) / len(y)

    def cross_vjp(self, w, h, v, X, y):
        return np.exp(h) * np.sign(w) @ v


def solved_lasso(h):
    X, y, *_ = regression()
    step, w = len(y) / np.linalg.norm(X, 2) ** 2, np.zeros(6)
    for _ in range(20_000):
        u = w - step * X.T @ (X @ w - y) / len(y)
        w = np.sign(u) * np.maximum(np.abs(u) - step * np.exp(h), 0)
    return w + 0.0


class TestKinksAndBounds:
    def at(self, backend, w, h):
        X, y, X_val, y_val = regression()
        lasso, outer = Lasso(), bl.problems.ridge().outer
        if backend.name != "numpy":
            xp = namespace(backend)
            inner = lambda w, h, X, y: lasso(w, h, X, y, xp)  # noqa: E731
            problem = bl.Problem(inner, lambda w, h, X, y: ((X @ w - y) ** 2).mean())
        else:
            problem = bl.Problem(lasso, outer)
        args = {"inner_args": moved(backend, (X, y)), "outer_args": moved(backend, (X_val, y_val))}
        return (problem, *moved(backend, (w, np.asarray(h)))), args

    @pytest.mark.parametrize("h", [-1.2, 2.0])
    def test_a_kink_that_holds_the_minimum(self, backend, h):
        w = solved_lasso(h)
        case, args = self.at(backend, w, h)
        report = bl.diagnose(*case, **args)
        assert names(report) == ["kink"]
        what, way_out = text(report, "kink")
        assert "params is at a kink of the inner loss" in what
        assert "bl.Proximal" in way_out
        assert "docs/problems.md" in way_out
        zeros = int((w == 0).sum())
        assert zeros == 6 or f"{zeros} of the 6 entries of params, which are exactly 0" in what
        assert "Train the inner problem further" not in words(report)
        assert not report.suggestions

    def test_the_same_kink_away_from_the_minimum_is_none(self, backend):
        case, args = self.at(backend, solved_lasso(-1.2) + 0.3, -1.2)
        assert names(bl.diagnose(*case, **args)) == ["not solved"]
        case, args = self.at(backend, np.zeros(6), -4.0)  # never trained
        assert names(bl.diagnose(*case, **args)) == ["not solved"]

    @autodiff
    def test_a_kink_with_a_singular_hessian_asks_for_no_other_solver(self, name):
        """Fewer examples than features."""
        backend = framework(name)
        case, args = self.at(backend, solved_lasso(-1.2), -1.2)
        few = {key: (X[:2], y[:2]) for key, (X, y) in args.items()}
        X, y = (backend.to_numpy(x) for x in few["inner_args"])
        step, w = 2 / np.linalg.norm(X, 2) ** 2, np.zeros(6)
        for _ in range(20_000):
            u = w - step * X.T @ (X @ w - y) / 2
            w = np.sign(u) * np.maximum(np.abs(u) - step * np.exp(-1.2), 0)
        report = bl.diagnose(case[0], backend.from_numpy(w + 0.0), case[2], **few)
        assert names(report) == ["kink", "solve failed"]
        assert "minres" not in str(report)
        assert "another solver does not help" in text(report, "solve failed")[0]

    def test_a_kink_elsewhere_than_at_zero(self, backend):
        w = np.array([0.7])

        class Median(Lasso):
            def __call__(self, w, h, xp=np):
                return abs(w - 0.7).sum() + 0.1 * ((w - h) ** 2).sum()

            def grad(self, w, h):
                return np.sign(w - 0.7) + 0.2 * (w - h)

            def hvp(self, w, h, v):
                return 0.2 * v

            def cross_vjp(self, w, h, v):
                return -0.2 * v

        median = Median()
        inner = median if backend.name == "numpy" else lambda w, h: median(w, h)
        outer = bl.problems.quadratic(np.eye(1), np.eye(1), np.zeros(1)).outer
        outer = outer if backend.name == "numpy" else lambda w, h: (w**2).sum()
        report = bl.diagnose(bl.Problem(inner, outer), *moved(backend, (w, np.zeros(1))))
        assert names(report) == ["kink"]

    def test_a_bound_that_holds_the_minimum(self, backend):
        rng = np.random.default_rng(0)
        X, X_val = rng.standard_normal((2, 60, 8))
        truth = np.r_[1.5 * np.ones(3), -np.ones(5)]
        h = np.full(8, -2.0)
        w = nnls(np.vstack([X / 60**0.5, np.diag(np.exp(h / 2))]), np.r_[X @ truth / 60**0.5, np.zeros(8)])[0]
        args = {
            "inner_args": moved(backend, (X, X @ truth)),
            "outer_args": moved(backend, (X_val, X_val @ truth)),
        }
        report = bl.diagnose(bl.problems.ridge(), *moved(backend, (w, h)), **args)
        assert names(report) == ["kink"]
        what, way_out = text(report, "kink")
        assert "A bound seems to hold params" in what
        assert f"{(w == 0).sum()} of the 8 entries of params, which are exactly 0" in what
        assert "bl.Projected" in way_out
        assert report.held.descent == pytest.approx(1, abs=0.1)

    @autodiff
    def test_a_leaf_that_starts_at_zero_is_no_bound(self, name):
        """Low-rank adaptation: the first factor has no gradient while the second is zero."""
        backend = framework(name)
        x, a, b = moved(backend, np.split(np.random.default_rng(0).standard_normal((12, 3)), [6, 9]))
        problem = bl.Problem(
            lambda p, h: ((x @ p["a"] @ p["b"] - x @ b) ** 2).sum() + h * (p["b"] ** 2).sum(),
            lambda p, h: ((x @ p["a"] @ p["b"]) ** 2).sum(),
        )
        report = bl.diagnose(problem, {"a": a, "b": 0 * b}, moved(backend, 0.1))
        assert "kink" not in names(report)

    def test_a_wrong_gradient_is_no_kink(self):
        problem, w, lam = quadratic(None, np.linspace(1, 4, 6), hypers=2, offset=False, away=0.3).at

        class Uphill(type(problem.inner)):
            def grad(self, *args):
                return -super().grad(*args)

        report = bl.diagnose(bl.Problem(Uphill(**vars(problem.inner)), problem.outer), w, lam)
        assert "kink" not in names(report)
        assert "wrong derivative" in names(report)
