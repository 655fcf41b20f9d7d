"""Fits of constrained problems: against closed forms, and multipliers of any solver."""

import numpy as np
import pytest
from constrained_cases import SIZE, SquaredNorm, nonlinear, point, program
from frameworks import moved

import bilevel as bl

START = {"w": np.full(SIZE, 0.1)}


def test_it_solves_the_kkt_system_of_a_program_with_equalities():
    problem, hparams = program(keys=("Q", "q", "A", "b"))
    problem = bl.Constrained(problem.objective, SquaredNorm(), problem.equality)
    params = bl.constrained_fit(problem)(hparams, START)
    A = hparams["A"]
    matrix = np.block([[hparams["Q"], A.T], [A, np.zeros((1, 1))]])
    expected = np.linalg.solve(matrix, np.concatenate([-hparams["q"], hparams["b"]]))
    np.testing.assert_allclose(np.concatenate([params["w"], params["equality"]]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_the_result_satisfies_the_kkt_conditions(method):
    problem, hparams = nonlinear(), point()
    params = bl.constrained_fit(problem, method=method)(hparams, START)
    w, nu, mu = params["w"], params["equality"], params["inequality"]
    slope = problem.objective.grad(w, hparams) + problem.equality.vjp_params(w, hparams, nu)
    np.testing.assert_allclose(slope + problem.inequality.vjp_params(w, hparams, mu), 0, atol=1e-12)
    np.testing.assert_allclose(problem.equality(w, hparams), 0, atol=1e-12)
    values = problem.inequality(w, hparams)
    assert (values <= 1e-12).all()
    assert (mu >= 0).all()
    np.testing.assert_allclose(mu * values, 0, atol=1e-12)


def test_frameworks_agree(backend):
    problem, hparams = nonlinear(), point()
    expected = bl.constrained_fit(problem)(hparams, START)
    params = bl.constrained_fit(problem)(moved(backend, hparams), moved(backend, START))
    for name, x in expected.items():
        np.testing.assert_allclose(backend.to_numpy(params[name]), x, atol=1e-10)


def test_float32_reaches_its_rounding(recwarn):
    problem, hparams = nonlinear(), point()
    single = {key: np.asarray(x, np.float32) for key, x in hparams.items()}
    params = bl.constrained_fit(problem)(single, {"w": START["w"].astype(np.float32)})
    assert params["w"].dtype == np.float32
    np.testing.assert_allclose(params["w"], bl.constrained_fit(problem)(hparams, START)["w"], atol=1e-5)
    assert not recwarn.list


def test_multipliers_of_a_rough_solution_become_accurate(backend):
    problem, hparams = nonlinear(), point()
    expected = bl.constrained_fit(problem)(hparams, START)
    noise = 1e-8 * np.random.default_rng(0).standard_normal(SIZE)
    rough = moved(backend, expected["w"] + noise)
    params = bl.with_multipliers(problem, rough, moved(backend, hparams))
    for name, x in expected.items():
        np.testing.assert_allclose(backend.to_numpy(params[name]), x, atol=1e-10)


def test_a_search_warm_starts_from_params_with_multipliers():
    problem, hparams = program(keys=("q",))
    fit = bl.constrained_fit(problem)
    found = bl.minimize(problem, hparams, fit=fit, params0=START, solver="minres", bounds=(-5, 5))
    assert found.fun < found.history[0].value
    assert set(found.params) == {"w", "equality", "inequality"}


def test_no_solution_warns():
    problem = bl.problems.quadratic_program(
        SquaredNorm(), Q=np.eye(1), q="q", G=np.array([[1.0], [-1.0]]), h=[-1.0, -1.0]
    )
    with pytest.warns(bl.SolverWarning, match=r"violates the constraints by up to 1: perhaps no w satisfies them"):
        bl.constrained_fit(problem)({"q": np.zeros(1)}, {"w": np.zeros(1)})


def test_wrong_solutions_raise():
    problem, hparams = nonlinear(), point()
    w = bl.constrained_fit(problem)(hparams, START)["w"]
    with pytest.raises(ValueError, match=r"w violates equality\[0\] by up to 0\.4"):
        bl.with_multipliers(problem, w + 0.1, hparams)
    with pytest.raises(ValueError, match=r"w violates inequality\[0\] by up to .*inequality\(w, hparams\) <= 0"):
        bl.with_multipliers(nonlinear(equality=False), np.tile([2.0, 0.0], 2), hparams)
    with pytest.raises(ValueError, match="w is no KKT point"):
        bl.with_multipliers(nonlinear(equality=False), np.zeros(SIZE), hparams)


def test_dependent_constraints_warn():
    G = np.array([[-1.0, 0.0], [-2.0, 0.0]])
    problem = bl.problems.quadratic_program(SquaredNorm(), Q=np.eye(2), q="q", G=G, h=[0.0, 0.0])
    with pytest.warns(bl.InnerProblemWarning, match=r"2 active constraints at w are linearly dependent \(rank 1\)"):
        bl.with_multipliers(problem, np.array([0.0, 1.0]), {"q": np.array([1.0, -1.0])})


def test_wrong_arguments_raise():
    smooth = bl.problems.quadratic(np.eye(2), np.eye(2), np.zeros(2))
    with pytest.raises(TypeError, match=r"expected a bl\.Constrained, got Problem"):
        bl.constrained_fit(smooth)
    with pytest.raises(TypeError, match=r"expected a bl\.Constrained, got Problem"):
        bl.with_multipliers(smooth, np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="method must be"):
        bl.constrained_fit(nonlinear(), method="BFGS")
    with pytest.raises(ValueError, match="the fit needs a start for w"):
        bl.constrained_fit(nonlinear())(point(), None)
    with pytest.raises(TypeError, match=r"use bl\.constrained_fit"):
        bl.scipy_fit(nonlinear())
    with pytest.raises(TypeError, match="inequality: expected an array"):
        bl.constrained_fit(bl.Constrained(smooth.inner, smooth.outer, inequality=lambda w, h: 1))(
            np.zeros(2), {"w": np.zeros(2)}
        )
