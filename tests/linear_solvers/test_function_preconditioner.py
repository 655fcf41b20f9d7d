"""A function v -> M v as a preconditioner."""

import cases
import numpy as np
import pytest
from frameworks import relative_error, solve

import bilevel as bl

DIAGONAL = np.geomspace(1e-4, 1, 20)


def test_it_multiplies_by_the_function(backend):
    matrix, rhs = np.diag(DIAGONAL), np.ones(20)
    inverse = backend.from_numpy(1 / DIAGONAL)
    solver = bl.CG(rtol=1e-10, preconditioner=lambda v: inverse * v)
    x, info = solve(backend, solver, matrix, rhs)
    assert info.status == bl.Status.CONVERGED
    assert info.steps == 1
    assert relative_error(x, rhs / DIAGONAL) <= 1e-9
    _, plain = solve(backend, bl.CG(rtol=1e-10), matrix, rhs)
    assert plain.steps > 10


def test_a_first_direction_of_negative_curvature_is_taken_with_its_absolute_value(backend):
    curvatures, weights, rhs = np.array([-1.0, -2.0, -4.0]), np.array([1.0, 0.5, 0.2]), np.array([1.0, 2.0, -1.0])
    factors, p = backend.from_numpy(weights), weights * rhs
    x, info = solve(backend, bl.CG(damping=0.0, preconditioner=lambda v: factors * v), np.diag(curvatures), rhs)
    assert (info.status, info.steps) == (bl.Status.NEGATIVE_CURVATURE, 1)
    expected = (rhs @ p) / abs(p @ (curvatures * p)) * p
    assert relative_error(x, expected) <= 1e-12
    assert info.residual_norm == pytest.approx(np.linalg.norm(rhs - curvatures * expected))


def test_the_same_function_makes_the_same_solver(backend):
    def unit(v):
        return v

    assert bl.CG(preconditioner=unit) == bl.CG(preconditioner=unit)
    assert bl.get_solver("cg", preconditioner=unit) == bl.CG(preconditioner=unit)
    case = cases.quadratic(backend)
    ours, plain = (case.hypergradient(solver) for solver in (bl.CG(preconditioner=unit), bl.CG()))
    assert relative_error(ours.grad, plain.grad) <= 1e-12
    prepared = bl.prepare(bl.CG(preconditioner=unit), *case.at)
    assert relative_error(case.hypergradient(prepared).grad, plain.grad) <= 1e-12


def test_another_shape_is_named(backend):
    case = cases.quadratic(backend)
    with pytest.raises(ValueError, match=r"preconditioner\(v\): expected the structure of params, where this leaf has"):
        case.hypergradient(bl.CG(preconditioner=lambda v: v[:2]))


SOLVERS = {
    "gmres": bl.GMRES(rtol=1e-10),
    "bicgstab": bl.BiCGStab(rtol=1e-10),
    "neumann": bl.Neumann(terms=30, rtol=1e-10),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "not symmetric"])
def test_other_solvers_take_one_too(backend, solver, is_symmetric):
    """The inverse of the diagonal, for a matrix that is a diagonal and a small part."""
    rng = np.random.default_rng(0)
    part = 0.02 * rng.standard_normal((20, 20))
    root = np.sqrt(DIAGONAL)
    matrix = np.diag(DIAGONAL) + root[:, None] * (part + part.T if is_symmetric else part) * root
    rhs, inverse = root * rng.standard_normal(20), backend.from_numpy(1 / DIAGONAL)
    with_it = bl.get_solver(solver, preconditioner=lambda v: inverse * v)
    for x0 in (None, np.ones(20)):
        x, info = solve(backend, with_it, matrix, rhs, x0, symmetric=is_symmetric)
        assert info.status == bl.Status.CONVERGED
        assert np.linalg.norm(rhs - matrix @ x) <= 1.001e-10 * np.linalg.norm(rhs)
        assert info.steps <= 20
    _, plain = solve(backend, solver, matrix, rhs, symmetric=is_symmetric)
    assert plain.status != bl.Status.CONVERGED or plain.steps > info.steps


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_identity_changes_nothing(backend, solver):
    rng = np.random.default_rng(1)
    matrix, rhs = np.eye(6) + 0.1 * rng.standard_normal((6, 6)), rng.standard_normal(6)
    with_it = bl.get_solver(solver, preconditioner=lambda v: 1 * v)
    (x, info), (y, plain) = (solve(backend, s, matrix, rhs, symmetric=False) for s in (with_it, solver))
    assert info.steps == plain.steps
    assert relative_error(x, y) <= 1e-13


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_ready_preconditioners_serve_other_solvers(backend, solver):
    case = cases.quadratic(backend)
    ours = bl.get_solver(solver, preconditioner=bl.DiagonalPreconditioner(), damping=0.1)
    if isinstance(solver, bl.Neumann):
        ours = bl.get_solver(ours, terms=500, step_size=0.3)
    exact = case.hypergradient(bl.Exact(damping=0.1))
    assert relative_error(case.hypergradient(ours).grad, exact.grad) <= 1e-6
    assert relative_error(case.hypergradient(bl.prepare(ours, *case.at)).grad, exact.grad) <= 1e-6


def test_a_sketch_needs_a_symmetric_operator(backend):
    case = cases.equation("root", backend)
    with pytest.raises(TypeError, match=r"NystromPreconditioner needs a symmetric operator.*DiagonalPreconditioner"):
        case.hypergradient(bl.GMRES(preconditioner=bl.NystromPreconditioner(rank=2)))


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_no_preconditioner(name):
    with pytest.raises(TypeError, match=rf'preconditioner: expected a function v -> M v.*"name": "{name}"'):
        bl.get_solver(name, preconditioner=3)
