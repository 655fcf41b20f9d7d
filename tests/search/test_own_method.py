"""Searches by a method of the user, as SciPy calls it."""

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

import bilevel as bl

TARGET = np.array([1.0, 2.0, -1.0])
PROBLEM = bl.problems.quadratic(hessian=2 * np.eye(3), coupling=np.eye(3), target=TARGET)  # F = ½ ‖λ/2 − t‖²


def descent(fun, x0, *, jac, bounds, callback, maxiter, rate=0.9, **_):
    """Projected gradient descent."""
    x = x0
    for _ in range(maxiter):
        x = np.clip(x - rate * jac(x), bounds.lb, bounds.ub) if bounds else x - rate * jac(x)
        callback(OptimizeResult(x=x))
    return OptimizeResult(x=x, fun=fun(x), nit=maxiter, success=True, status=0, message="The budget is used.")


def search(**options):
    return bl.minimize(PROBLEM, np.zeros(3), fit=lambda h, _: h / 2, method=descent, **options)


@pytest.mark.parametrize("bounds", [None, (-1.5, 3.0)])
def test_it_finds_the_minimum(bounds):
    seen = []
    found = search(bounds=bounds, maxiter=60, callback=lambda result: seen.append(result.nit))
    expected = 2 * TARGET if bounds is None else np.clip(2 * TARGET, *bounds)
    assert np.allclose(found.x, expected, atol=1e-3)
    assert (found.success, found.message, found.nit) == (True, "The budget is used.", 60)
    assert seen == [*range(1, 61)]
    assert found.fun == pytest.approx(0.5 * np.sum((found.x / 2 - TARGET) ** 2))


def test_options_reach_it_and_it_resumes_to_the_same_bits():
    whole = search(maxiter=10, options={"rate": 0.5})
    first = search(maxiter=4, options={"rate": 0.5})
    rest = search(maxiter=10, options={"rate": 0.5}, resume=first.state)
    assert np.array_equal(rest.x, whole.x)
    assert rest.fun == whole.fun
    assert not np.allclose(whole.x, search(maxiter=10).x)


def test_a_result_without_a_message():
    def at_the_start(fun, x0, **_):
        return OptimizeResult(x=x0, fun=fun(x0))

    found = bl.minimize(PROBLEM, np.zeros(3), fit=lambda h, _: h / 2, method=at_the_start)
    assert (found.nit, found.success, found.message) == (0, 0, "")
