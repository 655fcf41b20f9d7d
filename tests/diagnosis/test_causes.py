"""`bl.diagnose` names the leaf and the cause: no influence, no curvature, nan, kinks, and zeros."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases import quadratic
from frameworks import framework, moved, namespace
from reports import names, text, words

import bilevel as bl

autodiff = pytest.mark.parametrize("name", ["torch", "jax"])


@dataclass(frozen=True)
class Decayed:
    """½‖w − 1‖² + ½ Σ exp(a) w², with a = hparams["a"], in analytic derivatives."""

    def __call__(self, w, h):
        return 0.5 * ((w - 1) ** 2).sum() + 0.5 * (np.exp(h["a"]) * w**2).sum()

    def grad(self, w, h):
        return w - 1 + np.exp(h["a"]) * w

    def hvp(self, w, h, v):
        return v + np.exp(h["a"]) * v

    def cross_vjp(self, w, h, v):
        return {name: np.exp(lam) * w * v if name == "a" else 0 * lam for name, lam in h.items()}


@dataclass(frozen=True)
class WithPenalty:
    """½‖w‖² + ½ ‖b‖², with b = hparams["b"]."""

    def __call__(self, w, h):
        return 0.5 * (w**2).sum() + 0.5 * (h["b"] ** 2).sum()

    def grad(self, w, h):
        return w, {name: lam if name == "b" else 0 * lam for name, lam in h.items()}


class TestHyperparametersWithoutInfluence:
    def at(self, backend, decayed):
        """The problem with λ = {a, b, c}. Only ``decayed`` of them is in L, and only b is in F."""
        zeros = {name: np.full(3, 0.5) for name in "abc"}
        w = np.full(3, 1 / (1 + np.exp(0.5)))
        if backend.name == "numpy":
            return bl.Problem(Decayed(), WithPenalty()), w, zeros
        xp = namespace(backend)

        def inner(w, h):
            return 0.5 * ((w - 1) ** 2).sum() + 0.5 * (xp.exp(h["a"] if decayed else closed) * w**2).sum()

        closed = moved(backend, zeros["a"])
        outer = WithPenalty()
        return bl.Problem(inner, lambda w, h: outer(w, h)), moved(backend, w), moved(backend, zeros)

    def test_each_leaf_is_named(self, backend):
        report = bl.diagnose(*self.at(backend, True))
        assert names(report) == ["no influence"]
        what, way_out = text(report, "no influence")
        assert "∂L/∂w does not depend on hparams['b']: there, the hypergradient is ∂F/∂λ only." in what
        assert "Neither F nor ∂L/∂w depends on hparams['c']" in what
        assert "hparams['a']" not in what
        assert "closed over" in way_out
        assert report.verified

    @autodiff
    def test_a_closure_in_place_of_hparams(self, name):
        problem, w, h = self.at(framework(name), False)
        assert "no influence" in names(bl.diagnose(problem, w, h))
        only = {"b": h["b"]}
        report = bl.diagnose(problem, w, only)
        assert names(report) == ["no influence"]
        assert "does not depend on any of hparams: the hypergradient is ∂F/∂λ only" in text(report, "no influence")[0]
        backend = framework(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.DependenceWarning)
            grad = bl.hypergradient(problem, w, only).grad
        np.testing.assert_allclose(backend.to_numpy(grad["b"]), 0.5)  # that is ∂F/∂λ

    def test_a_product_that_vanishes_only_here_is_not_blamed(self, backend):
        """At w = 0, a penalty has no influence."""
        problem, w, h = self.at(backend, True)
        report = bl.diagnose(problem, 0 * w, h)
        assert "hparams['a']" not in text(report, "no influence")[0]

    def test_of_an_equation(self):
        backend = framework("torch")
        h = moved(backend, {"a": np.ones(2), "b": np.ones(2)})
        w = moved(backend, np.full(2, 2.0))
        problem = bl.FixedPoint(lambda w, h: w / 2 + h["a"], lambda w, h: (w**2).sum() + h["b"].sum())
        report = bl.diagnose(problem, w, h, solver="gmres")
        assert names(report) == ["no influence"]
        assert "The residual does not depend on hparams['b']" in text(report, "no influence")[0]


@autodiff
class TestParamsWithoutCurvature:
    def at(self, name, inner, outer):
        """The problem with a head that only F uses, unless inner does."""
        backend = framework(name)
        xp = namespace(backend)
        X, y = moved(backend, np.eye(3) + 0.1), moved(backend, np.ones(3))

        def whole(p, h):
            return ((X @ p["w"] - y) ** 2).sum() + xp.exp(h) * (p["w"] ** 2).sum() + inner(p, h)

        solution = np.linalg.solve((np.eye(3) + 0.1) @ (np.eye(3) + 0.1) + np.eye(3), (np.eye(3) + 0.1) @ np.ones(3))
        params = moved(backend, {"w": solution, "head": np.ones((4, 2))})
        return bl.Problem(whole, outer), params, moved(backend, 0.0)

    def test_a_head_that_only_the_outer_loss_uses(self, name):
        case = self.at(name, lambda p, h: 0, lambda p, h: ((p["w"] - 1) ** 2).sum() + ((p["head"] - 2) ** 2).sum())
        report = bl.diagnose(*case)
        assert names(report) == ["no curvature", "solve failed"]
        what, way_out = text(report, "no curvature")
        assert "does not depend on params['head'] (all 8 entries), but the outer loss does" in what
        assert "add a penalty" in way_out
        assert "minres" not in str(report)
        damped = bl.diagnose(*case, solver=bl.CG(damping=0.1))
        assert names(damped) == ["no curvature"]
        assert "only the damping determines" in text(damped, "no curvature")[0]

    def test_rows_without_data(self, name):
        case = self.at(
            name, lambda p, h: ((p["head"][:2] - 1) ** 2).sum(), lambda p, h: (p["head"][1:3] ** 2).sum() + h
        )
        report = bl.diagnose(*case)
        assert "does not depend on 2 of the 8 entries of params['head']" in text(report, "no curvature")[0]
        assert "no curvature" not in names(bl.diagnose(*case, solver=bl.CG(damping=0.1)))  # the rows have no effect

    def test_a_leaf_that_enters_linearly(self, name):
        case = self.at(name, lambda p, h: h * p["head"].sum() + p["head"].sum(), lambda p, h: (p["w"] ** 2).sum())
        report = bl.diagnose(*case)
        assert "has no curvature in params['head'] (all 8 entries)" in text(report, "no curvature")[0]

    def test_a_leaf_that_nothing_uses_does_no_harm(self, name):
        assert bl.diagnose(*self.at(name, lambda p, h: 0, lambda p, h: (p["w"] ** 2).sum())).ok

    @pytest.mark.parametrize("solver", ["cg", "neumann", "nystrom"])
    def test_a_hessian_of_zeros(self, name, solver):
        """Example weights that start at zero."""
        backend = framework(name)
        x = moved(backend, np.random.default_rng(0).standard_normal((8, 3)))
        problem = bl.Problem(lambda w, e: (e * (x @ w - 1) ** 2).sum(), lambda w, e: ((x @ w - 2) ** 2).sum())
        report = bl.diagnose(problem, *moved(backend, (np.ones(3), np.zeros(8))), solver=solver)
        assert "has no curvature in params (all 3 entries)" in text(report, "no curvature")[0]
        assert not report.suggestions


class TestAtZero:
    def test_a_convex_problem_does_not_curve_down(self, backend):
        problem = bl.problems.quadratic(*moved(backend, (np.diag([1.0, 4.0]), np.eye(2), np.ones(2))))
        report = bl.diagnose(problem, *moved(backend, (np.zeros(2), np.ones(2))))
        assert names(report) == ["not solved"]
        assert "curves down" not in words(report)
        # The step of steepest descent from zero, with ∂L/∂w = −(1, 1).
        assert report.step == pytest.approx(2**0.5 / 2.5)
        assert "the minimum is at least 0.57 away (params is zero)" in words(report)

    def test_a_minimum_at_zero_is_a_minimum(self, backend):
        problem = bl.problems.quadratic(*moved(backend, (np.diag([1.0, 4.0]), np.eye(2), np.ones(2))))
        assert bl.diagnose(problem, *moved(backend, (np.zeros(2), np.zeros(2)))).ok

    @pytest.mark.parametrize("value", [0.0, 1e-9, 1e-13, 0.1 + 0.2 - 0.3])
    def test_a_hyperparameter_that_is_zero_up_to_rounding_is_checked(self, backend, value):
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((20, 3)), np.ones(20)
        w = np.linalg.solve(X.T @ X / 20 + np.exp(value) * np.eye(3), X.T @ y / 20)
        args = {"inner_args": moved(backend, (X, y)), "outer_args": moved(backend, (X, 2 * y))}
        report = bl.diagnose(bl.problems.ridge(), *moved(backend, (w, np.asarray(value))), **args)
        assert report.ok, report
        assert report.verified

    def test_a_derivative_below_the_rounding_of_its_differences_is_not_blamed(self):
        """The differences of a large F are zero, and its derivative is not."""
        problem, w, lam = quadratic(None, np.ones(3), hypers=2, offset=False).at

        class Large(type(problem.outer)):
            def __call__(self, *args):
                return 1e14 + super().__call__(*args)

        report = bl.diagnose(bl.Problem(problem.inner, Large(**vars(problem.outer))), w, lam)
        assert not any(a.wrong for a in report.derivatives.of)
        assert "outer grad_params" in report.unchecked


def singular(xp):
    """Losses with a derivative that is nan, and the words of the report."""
    return {
        "loss": (lambda w, h: ((w["a"] - h) ** 2).sum() * xp.exp(1000 * h.sum()), "The inner loss is nan or infinite"),
        "gradient": (
            lambda w, h: ((w["a"] - h) ** 2).sum() + (w["b"] ** 2).sum() ** 0.5 * h.sum() + (w["b"] ** 2).sum(),
            "its gradient ∂L/∂w is nan or infinite in params['b'] (all 2 entries)",
        ),
        "product": (
            lambda w, h: ((w["a"] - h) ** 2).sum() + (abs(w["b"]) ** 1.5).sum() + (w["b"] ** 2).sum(),
            "products with the derivative of ∂L/∂w by params are nan or infinite in params['b'] (all 2 entries)",
        ),
    }


@autodiff
class TestNotFinite:
    def at(self, name):
        backend = framework(name)
        params, hparams = moved(backend, ({"a": np.ones(2), "b": np.zeros(2)}, np.ones(2)))
        return namespace(backend), params, hparams

    @pytest.mark.parametrize("what", ["loss", "gradient", "product"])
    def test_of_the_inner_loss(self, name, what):
        xp, w, h = self.at(name)
        inner, sentence = singular(xp)[what]
        report = bl.diagnose(bl.Problem(inner, lambda w, h: (w["a"] ** 2).sum()), w, h)
        assert names(report) == ["not finite"]
        found, way_out = text(report, "not finite")
        assert sentence in found
        causes = {"loss": "overflow", "gradient": "no derivative at this point", "product": "no second derivative"}
        assert causes[what] in way_out
        assert "repeatable" not in words(report)
        assert "There are no differences of values that are nan" in words(report)

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_of_the_outer_loss(self, name, what):
        xp, w, h = self.at(name)
        outer, sentence = singular(xp)[what]
        report = bl.diagnose(bl.Problem(lambda w, h: ((w["a"] - h) ** 2).sum() + (w["b"] ** 2).sum(), outer), w, h)
        assert sentence.replace("inner", "outer").replace("∂L", "∂F") in text(report, "not finite")[0]

    def test_where_with_an_invalid_branch(self, name):
        xp, w, h = self.at(name)
        outer = lambda w, h: (xp.where(w["b"] > 0, xp.sqrt(w["b"]), 0 * w["b"]) + w["b"]).sum()  # noqa: E731
        report = bl.diagnose(bl.Problem(lambda w, h: ((w["a"] - h) ** 2).sum() + (w["b"] ** 2).sum(), outer), w, h)
        assert "The outer loss is finite, but its gradient ∂F/∂w is nan" in text(report, "not finite")[0]
        assert "where()" in text(report, "not finite")[1]


@pytest.mark.parametrize("which", ["inner_args", "outer_args", "params", "hparams"])
def test_nan_in_an_argument_is_located(backend, which):
    rng = np.random.default_rng(0)
    X, y, w = rng.standard_normal((9, 4)), np.ones(9), np.zeros(4)
    trees: dict[str, Any] = {"params": w, "hparams": w - 1, "inner_args": (X, y), "outer_args": (X + 1, y)}
    spoilt = (trees[which][0] if which.endswith("args") else trees[which]).copy()
    spoilt.flat[1] = np.nan
    trees[which] = (spoilt, y) if which.endswith("args") else spoilt
    report = bl.diagnose(bl.problems.ridge(), **moved(backend, trees))
    leaf, size, cause = {
        "inner_args": ("inner_args[0]", 36, "data"),
        "outer_args": ("outer_args[0]", 36, "data"),
        "params": ("params", 4, "inner training diverged"),
        "hparams": ("hparams", 4, "outer step diverged"),
    }[which]
    assert names(report) == ["not finite"]
    assert text(report, "not finite")[0] == f"There is nan or infinity in 1 of the {size} entries of {leaf}."
    assert cause in text(report, "not finite")[1]


def test_an_infinity_in_a_mask_is_not_the_cause_of_a_missing_derivative():
    backend = framework("torch")
    xp = namespace(backend)
    mask, w, h = moved(backend, (np.array([0.0, -np.inf]), np.zeros(2), np.ones(2)))
    inner = lambda w, h, mask: ((w - h) ** 2).sum() + (abs(w) ** 1.5).sum() + xp.exp(mask + 0 * w).sum()  # noqa: E731
    report = bl.diagnose(bl.Problem(inner, lambda w, h: (w**2).sum()), w, h, inner_args=(mask,))
    assert "products with the derivative of ∂L/∂w" in text(report, "not finite")[0]


def test_losses_in_place_of_a_problem_are_refused():
    with pytest.raises(TypeError, match=r"problem: expected bl.Problem\(inner, outer\), .* got function"):
        bl.diagnose(lambda w, h: w, np.ones(2), np.ones(2))


def test_a_formula_that_writes_to_its_arguments_is_found():
    problem, w, lam = quadratic(None, np.ones(3), hypers=2, offset=False).at

    class Clipped(type(problem.inner)):
        def grad(self, w, *args):
            np.clip(w, 0, None, out=w)
            return super().grad(w, *args)

    w = np.array([-1.0, 2.0, 3.0])
    report = bl.diagnose(bl.Problem(Clipped(**vars(problem.inner)), problem.outer), w, lam)
    assert names(report)[0] == "writes"
    assert "A loss writes to params." in text(report, "writes")[0]
    np.testing.assert_array_equal(w, [-1.0, 2.0, 3.0])


def test_flax_users_get_a_hint_about_spectral_normalisation():
    from bilevel.diagnosis.findings import GRAD_CAUSES, HVP_CAUSES

    assert "update_stats=False" in GRAD_CAUSES
    assert "update_stats=False" in HVP_CAUSES
