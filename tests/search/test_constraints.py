"""Searches with constraints, against SciPy's minimum of closed forms."""

import numpy as np
import pytest
from scipy import optimize

import bilevel as bl

PROBLEM = bl.problems.quadratic(hessian=2 * np.eye(3), coupling=np.eye(3), target=np.array([1.0, 2.0, -1.0]))
# w* = λ/2, so F = ½ ‖λ/2 − t‖², whose minimum is at λ = 2t = (2, 4, −2).
SUM = np.ones((1, 3))
KINDS = {
    "linear": optimize.LinearConstraint(SUM, 1.0, 1.0),
    "nonlinear": optimize.NonlinearConstraint(lambda x: x @ x, -np.inf, 6.0, jac=lambda x: 2 * x[None]),
    "dict": {"type": "ineq", "fun": lambda x: 6.0 - x @ x, "jac": lambda x: -2 * x},
}
TARGET = np.array([2.0, 4.0, -2.0])
EXPECTED = {
    "linear": TARGET - (TARGET.sum() - 1) / 3,  # the projections of 2t
    "nonlinear": TARGET * np.sqrt(6 / (TARGET @ TARGET)),
    "dict": TARGET * np.sqrt(6 / (TARGET @ TARGET)),
}


def search(**options):
    return bl.minimize(PROBLEM, np.array([0.3, 0.2, 0.5]), fit=lambda h, _: h / 2, **options)


@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")  # SciPy, where the objective is quadratic
@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_constrained_search_finds_the_closed_form(method, kind):
    found = search(method=method, constraints=KINDS[kind], maxiter=200)
    assert found.success, found.message
    assert np.allclose(found.x, EXPECTED[kind], atol=1e-4)
    assert found.fun == pytest.approx(0.5 * np.sum((found.x / 2 - TARGET / 2) ** 2), rel=1e-12)
    assert np.allclose(found.params, found.x / 2)


def test_bounds_hold_beside_constraints():
    found = search(method="slsqp", constraints=[KINDS["linear"]], bounds=(-1.0, 2.0))
    assert found.success, found.message
    assert np.allclose(found.x, [0.0, 2.0, -1.0], atol=1e-6)  # the nearest point to (2, 4, −2) in the box and plane


@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")
@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_a_resumed_constrained_search_has_the_same_bits(method):
    whole = search(method=method, constraints=KINDS["nonlinear"], maxiter=9)
    state = search(method=method, constraints=KINDS["nonlinear"], maxiter=3).state
    seen = []
    resumed = search(
        method=method, constraints=KINDS["nonlinear"], maxiter=9, resume=state, callback=lambda r: seen.append(r.nit)
    )
    assert resumed.x.tobytes() == whole.x.tobytes()
    assert resumed.history == whole.history
    assert seen[0] > 1


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_a_callback_stops_a_constrained_search(method):
    def stop(result):
        raise StopIteration

    assert search(method=method, constraints=KINDS["linear"], callback=stop).nit <= 2


@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")
def test_a_looser_tolerance_ends_a_search_earlier():
    options = {"method": "trust-constr", "constraints": KINDS["nonlinear"], "maxiter": 300}
    loose, tight = (search(tol=tol, **options) for tol in (1e-2, 1e-8))
    assert loose.nfev < tight.nfev
    assert np.allclose(tight.x, EXPECTED["nonlinear"], atol=1e-5)


def test_constraints_of_a_method_without_them_are_named():
    with pytest.raises(ValueError, match='L-BFGS-B does not accept constraints; use method="SLSQP" or "trust-constr"'):
        search(constraints=KINDS["linear"])
    with pytest.raises(ValueError, match='CG does not accept bounds; use method="L-BFGS-B" or "SLSQP"'):
        search(method="CG", bounds=(0, 1))
