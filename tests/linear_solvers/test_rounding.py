"""Laws of float32 with 40 unknowns, and a planted fault for each that it catches."""

from types import ModuleType

import numpy as np
import pytest
from frameworks import failures, framework, solve, symmetric
from mutants import mutant

import bilevel as bl
from bilevel.linear_solvers import bicgstab, cg, gmres, minres, restarts
from bilevel.testing import check_solver

EPS = float(np.finfo(np.float32).eps)


def rhs_of(seed: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).standard_normal(40).astype(np.float32)


def worst_against_least_squares(backend, solver):
    """Return the largest norm(b - A x), over the least that there is, on singular systems without a solution."""
    worst = 0.0
    for null in (1, 10, 20):
        for largest in (3, 4, 6, 10):
            for seed in range(7):
                matrix = symmetric(np.concatenate([np.zeros(null), np.linspace(1, largest, 40 - null)]), seed)
                _, vectors = np.linalg.eigh(matrix)
                matrix, rhs = matrix.astype(np.float32), rhs_of(seed)
                x, _ = solve(backend, solver, matrix, rhs)
                left = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
                worst = max(worst, left / np.linalg.norm(vectors[:, :null].T @ rhs))
    return worst


def most_steps_of_a_full_cycle(backend, solver):
    """Return the most steps on 40 unknowns with a few large eigenvalues, and the largest residual over eps norm(A)."""
    most, worst = 0, 0.0
    for outliers in ([1e4], [1e3, 1e4], [1e2, 1e3, 1e4]):
        for seed in range(8):
            matrix = symmetric([*np.linspace(1, 2, 40 - len(outliers)), *outliers], seed).astype(np.float32)
            rhs = rhs_of(seed)
            x, info = solve(backend, solver, matrix, rhs)
            most = max(most, info.steps)
            left = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
            worst = max(worst, left / (EPS * 1e4 * np.linalg.norm(x)))
    return most, worst


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_minres_ends_near_a_least_squares_solution(name):
    assert worst_against_least_squares(framework(name), bl.MINRES()) <= 1.25


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_gmres_ends_within_as_many_steps_as_there_are_unknowns(name):
    most, residual = most_steps_of_a_full_cycle(framework(name), bl.GMRES(restart=40))
    assert most <= 40
    assert residual <= 1


def with_restarts(module: ModuleType, line: str, fault: str) -> ModuleType:
    """Return a copy of a solver's module that restarts with a fault."""
    copy = mutant(module, "return solve_with_restarts(", "return solve_with_restarts(")
    copy.solve_with_restarts = mutant(restarts, line, fault).solve_with_restarts
    return copy


def without_limit(*_):
    return restarts.Reach(np.inf, np.inf)


class TestFaults:
    def test_cg_that_follows_rounding_noise(self):
        copy = mutant(cg, "curvature > eps * largest", "curvature > 0")
        assert "runaway-numpy" in failures(check_solver(copy.CG(), solves=["definite"], backends="numpy"))

    def test_restarts_that_keep_the_worse_iterate(self):
        copy = with_restarts(bicgstab, "worse, start, s.x", "worse & False, start, s.x")
        copy.reach = without_limit
        said = failures(check_solver(copy.BiCGStab(), solves=["definite"], backends="numpy"))
        assert "info.residual_norm" in said["nearly_singular-numpy"]

    def test_minres_that_does_not_see_its_accuracy_lost(self):
        copy = mutant(minres, "lost = ~done & (", "lost = ~done & False & (")
        copy.reach = without_limit
        assert worst_against_least_squares(framework("numpy"), copy.MINRES()) > 1.5

    def test_gmres_that_orthogonalises_once(self):
        faulty = mutant(gmres, "in range(2)", "in range(1)").GMRES(restart=40)
        assert most_steps_of_a_full_cycle(framework("numpy"), faulty)[0] > 45
