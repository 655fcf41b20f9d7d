"""The products that forward mode takes."""

import numpy as np
import pytest
from cases import quadratic
from frameworks import framework, relative_error
from unrolled_cases import PROBLEM, Quartic

import bilevel as bl


class TestCrossProducts:
    """jvp_hparams is the transpose of vjp_hparams: ⟨v, C u⟩ = ⟨Cᵀ v, u⟩."""

    @staticmethod
    def check(backend, problem, params, hparams, args):
        left, right = (backend.to_numpy(x) for x in backend.run(_products, problem, params, hparams, args))
        assert left == pytest.approx(right, rel=1e-10)
        assert abs(left) > 1e-6

    @pytest.mark.parametrize("kind", ["ridge", "logistic_regression"])
    @pytest.mark.parametrize("shape", [(), (5,), (5, 3), "groups"])
    def test_of_the_ready_problems(self, backend, kind, shape):
        rng = np.random.default_rng(0)
        y = rng.standard_normal((9, 3)) if kind == "ridge" else rng.integers(0, 3, 9)
        args = tuple(map(backend.from_numpy, (rng.standard_normal((9, 5)), y)))
        groups, shape = ([0, 1, 1, 0, 1], (2,)) if shape == "groups" else (None, shape)
        problem = getattr(bl.problems, kind)(groups)
        w, h = (backend.from_numpy(np.asarray(rng.standard_normal(s))) for s in ((5, 3), shape))
        self.check(backend, problem, w, h, args)

    def test_of_the_quadratic(self, backend):
        problem, w, lam = quadratic(backend).at
        self.check(backend, problem, w, lam, ())

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_of_trees_with_leaves_that_do_not_meet(self, name):
        backend = framework(name)
        rng = np.random.default_rng(0)
        a, b, c, d, e = (backend.from_numpy(rng.standard_normal(3)) for _ in range(5))

        def inner(p, h):  # ∂L/∂c is constant, h["e"] without influence, ∂L/∂a linear in h["d"]
            return (p["a"] ** 2 * h["d"] + (p["b"] ** 4)).sum() + p["c"].sum() + (p["b"] * h["d"] ** 3).sum()

        problem, params, hparams = bl.Problem(inner, inner), {"a": a, "b": b, "c": c}, {"d": d, "e": e}
        self.check(backend, problem, params, hparams, ())
        u = {"d": e, "e": d}
        product = backend.run(_cross_jvp, problem, params, hparams, u)
        assert backend.to_numpy(product["a"]) == pytest.approx(backend.to_numpy(2 * a * e))
        assert backend.to_numpy(product["b"]) == pytest.approx(backend.to_numpy(3 * d**2 * e))
        assert backend.to_numpy(product["c"]).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_where_there_is_no_influence(self, name):
        backend = framework(name)
        w, h = (backend.from_numpy(np.arange(3.0)) for _ in range(2))
        for inner in (lambda w, h: (w**2).sum(), lambda w, h: w.sum()):
            problem = bl.Problem(inner, lambda w, h: (w * h).sum())
            product = backend.run(_cross_jvp, problem, w, h, h)
            assert backend.to_numpy(product).tolist() == [0, 0, 0]
            with pytest.warns(bl.DependenceWarning, match="has no influence on the minimum"):
                hg = bl.hypergradient(problem, w, h, solver=bl.Unrolled(steps=2, step_size=0.25, mode="forward"))
            assert backend.to_numpy(hg.grad).tolist() == backend.to_numpy(hg.params).tolist()


def _products(backend, problem, params, hparams, args):
    at, of_params, of_hparams = (
        backend.inner(problem.inner, params, hparams, args),
        *map(backend.space, (params, hparams)),
    )
    v, u = of_params.normal(1), of_hparams.normal(2)
    return of_params.dot(v, at.jvp_hparams(u)), of_hparams.dot(at.vjp_hparams(v), u)


def _cross_jvp(backend, problem, params, hparams, u):
    return backend.inner(problem.inner, params, hparams, ()).jvp_hparams(u)


def test_the_gradient_alone_is_that_of_the_derivatives(backend):
    case = Quartic()
    at = (*map(backend.from_numpy, (case.w, case.h)), tuple(map(backend.from_numpy, case.batches[0])))
    alone, among = backend.run(_gradients, PROBLEM, *at)
    assert relative_error(backend.to_numpy(alone), backend.to_numpy(among)) <= 1e-14


def _gradients(backend, problem, *at):
    return problem.value_and_residual(backend, *at)[1], backend.inner(problem.inner, *at).residual
