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
