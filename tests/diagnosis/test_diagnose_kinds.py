"""`bl.diagnose` on equations, and where other products stand for the Hessian."""

import numpy as np
import pytest
from cases import KINDS, Affine, equation
from frameworks import framework, namespace
from reports import blamed, names, words

import bilevel as bl
from bilevel.diagnosis.agreement import DERIVATIVES


class Transposed(Affine):
    def vjp_params(self, w, h, v, A, B, c):
        return A @ v


class Signed(Affine):
    def vjp_hparams(self, w, h, v, A, B, c):
        return -B.T @ v


@pytest.mark.parametrize("kind", KINDS)
class TestEquations:
    def test_what_is_right_is_not_blamed(self, backend, kind):
        case = equation(kind, backend, weights=4)
        report = bl.diagnose(*case.at, solver="gmres", **case.args)
        assert report.ok
        assert report.verified
        assert report.derivatives.names == DERIVATIVES[1:]
        assert report.curvature == "equation"
        assert report.residual <= 1e-10
        assert "residual has norm" in words(report)
        assert "Jacobian is not symmetric" in words(report)
        assert report.suggestions == ("keep GMRES(), which took 4 steps.",)

    @pytest.mark.parametrize(
        ("function", "derivative"), [(Transposed(), "inner hvp"), (Signed(), "inner cross_vjp")], ids=["w", "h"]
    )
    def test_a_mistake_in_a_formula_is_named(self, kind, function, derivative):
        case = equation(kind, weights=4, hypers=4, function=function)
        assert blamed(bl.diagnose(*case.at, solver="gmres", **case.args)) == {derivative}

    def test_being_away_from_the_solution_is_found(self, kind):
        case = equation(kind, away=0.5)
        report = bl.diagnose(*case.at, solver="gmres", **case.args)
        assert names(report) == ["not solved"]
        assert "does not solve the equation" in words(report)

    def test_another_solver_is_suggested_by_name(self, kind):
        case = equation(kind)
        report = bl.diagnose(*case.at, solver="identity", **case.args)
        assert 'solver="gmres"' in report.suggestions[0]


def model_problem(backend, dtype, curvature):
    """A tanh network with squares for a loss: problem, params, hparams and data."""
    xp, rng = namespace(backend), np.random.default_rng(0)
    x, y, a, b = (backend.from_numpy(rng.standard_normal(s).astype(dtype)) for s in ((9, 3), (9,), (3, 2), (2,)))

    def model(w, h, x):
        return xp.tanh(x @ w["a"]) @ w["b"]

    def loss(output, y):
        return ((output - y) ** 2).mean()

    def outer(w, h, x, y):
        return loss(model(w, h, x), y)

    def penalty(w, h):
        return xp.exp(h) * sum((p**2).sum() for p in w.values())

    problem = bl.Problem.from_model(model, loss, outer, penalty=penalty, curvature=curvature)
    hparams = backend.from_numpy(np.asarray(-2.0, dtype))
    return problem, {"a": a, "b": b}, hparams, {"inner_args": (x, y), "outer_args": (x + 1, y)}


class TestCurvatures:
    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_gauss_newton_products_are_not_taken_for_derivatives(self, name):
        *case, args = model_problem(framework(name), np.float64, "gauss-newton")
        report = bl.diagnose(*case, solver="identity", **args)
        assert report.verified
        assert "inner hvp" not in report.derivatives.names
        assert "inner hvp: not a derivative" in words(report)
        assert "eigenvalues of gauss-newton products" in words(report)
        assert report.eigenvalues.smallest > 0
        assert report.asymmetry <= 1e-10

    def test_differences_of_gradients_are_right_to_their_precision(self):
        *case, args = model_problem(framework("torch"), np.float32, "finite-differences")
        report = bl.diagnose(*case, solver=bl.CG(rtol=1e-2), **args)
        assert report.verified
        assert report.derivatives.eps < 1e-15
        assert "not symmetric" not in names(report)
