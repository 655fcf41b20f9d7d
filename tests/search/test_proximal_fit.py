"""The accelerated proximal gradient method: against closed forms, and its stop rule."""

import numpy as np
import pytest
from frameworks import moved, relative_error
from hypothesis import given
from hypothesis import strategies as st
from proximal_cases import Distance, Quadratic
from scipy import optimize

import bilevel as bl
from bilevel import projections, prox


class Quartic:
    """¼ Σ (w − 3)⁴, whose curvature grows from zero at w = 3."""

    def __call__(self, w, h):
        return 0.25 * ((w - 3) ** 4).sum()

    def grad(self, w, h):
        return (w - 3) ** 3

    def hvp(self, w, h, v):
        return 3 * (w - 3) ** 2 * v

    def cross_vjp(self, w, h, v):
        return None


@pytest.mark.parametrize("start", [2.999, 3.5, -2.0])
def test_the_step_size_follows_the_curvature(backend, start):
    """Near w = 3, the first step size is far too long for the solution, 3 − exp(λ)^(1/3)."""
    problem = bl.Proximal(Quartic(), prox.l1(), Distance())
    h, params0 = moved(backend, (np.log(8.0), np.full(2, start)))
    found = bl.proximal_fit(problem, gtol=1e-12)(h, params0)
    assert relative_error(backend.to_numpy(found), np.ones(2)) <= 1e-11


@given(seed=st.integers(0, 2**32 - 1))
def test_it_solves_nonnegative_least_squares(seed):
    rng = np.random.default_rng(seed)
    X, t = rng.standard_normal((12, 6)), rng.standard_normal(12)
    problem = bl.Projected(Quadratic(), projections.nonnegative(), Distance())
    found = bl.proximal_fit(problem, inner_args=(X.T @ X, X.T @ t), gtol=1e-11)({"shift": np.zeros(6)}, np.zeros(6))
    assert np.allclose(found, optimize.nnls(X, t)[0], atol=1e-8)


def test_it_warns_if_it_does_not_reach_its_tolerance(backend):
    problem = bl.Proximal(Quadratic(), prox.l1(0.1), Distance())
    data = moved(backend, (np.diag([1.0, 1e-4]), np.ones(2)))
    h, params0 = moved(backend, ({"shift": np.zeros(2)}, np.zeros(2)))
    with pytest.warns(bl.SolverWarning, match=r"proximal_fit stopped after 3 iterations with .*raise maxiter or gtol"):
        bl.proximal_fit(problem, inner_args=data, maxiter=3)(h, params0)


def test_rounding_ends_it_without_a_warning():
    problem = bl.Proximal(Quadratic(), prox.l1(0.1), Distance())
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 5)).astype(np.float32)
    data, h = (X.T @ X, 100 * np.ones(5, np.float32)), {"shift": np.zeros(5, np.float32)}
    found = bl.proximal_fit(problem, inner_args=data, gtol=0.0)(h, np.zeros(5, np.float32))
    exact = bl.proximal_fit(problem, inner_args=tuple(x.astype(float) for x in data))(
        {"shift": np.zeros(5)}, np.zeros(5)
    )
    assert found.dtype == np.float32
    assert relative_error(found, exact) <= 1e-5


def test_micro_batches_have_the_same_solution():
    problem = bl.Proximal(Quadratic(), prox.l1(0.1), Distance())
    h, data = {"shift": np.zeros(2)}, (np.eye(2), np.ones(2))
    found = bl.proximal_fit(problem, inner_args=bl.MicroBatches([data, data]))(h, np.zeros(2))
    assert np.allclose(found, 0.9)


def test_a_missing_start_is_named():
    with pytest.raises(ValueError, match="params0: the fit needs a start"):
        bl.proximal_fit(bl.Proximal(Quartic(), prox.l1(), Distance()))(np.zeros(()), None)
