"""Singular systems without a solution: v stays bounded, and solvers by least squares find the least residual."""

import numpy as np
import pytest
from frameworks import DTYPES, solve, symmetric

import bilevel as bl
from bilevel import Status

SIZE = 8
LAPLACE = np.array([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, 2.0]])
SMALL = {"diagonal": np.diag([1.0, 2.0, 0.0]), "laplacian": LAPLACE}
LEAST_SQUARES = {"minres": bl.MINRES(), "gmres": bl.GMRES(), "exact": bl.Exact(), "normal-cg": bl.NormalCG()}
SOLVERS = {**LEAST_SQUARES, "bicgstab": bl.BiCGStab()}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def least(matrix, rhs):
    """The smallest residual of the exact system, and the solution of least norm that has it."""
    x = np.linalg.lstsq(matrix, rhs, rcond=1e-10)[0]
    return np.linalg.norm(rhs - matrix @ x), np.linalg.norm(x)


def random_system(seed, is_symmetric):
    rng = np.random.default_rng(seed)
    values = np.exp(rng.uniform(np.log(0.01), 0, SIZE)) * np.sign(rng.standard_normal(SIZE))
    values[0] = 0
    if is_symmetric:
        return symmetric(values, seed), rng.standard_normal(SIZE)
    left, _, right = np.linalg.svd(rng.standard_normal((SIZE, SIZE)))
    return left @ np.diag(values) @ right, rng.standard_normal(SIZE)


def check(backend, solver, dtype, matrix, rhs, is_symmetric):
    x, info = solve(backend, solver, matrix.astype(dtype), rhs.astype(dtype), symmetric=is_symmetric)
    residual, norm = least(matrix, rhs)
    root = float(np.finfo(dtype).eps) ** 0.5
    assert info.status == Status.MAXITER
    # Each of at most ten cycles goes no further than its residual over √eps times the norm of A.
    assert np.linalg.norm(x) <= norm + 10 * np.linalg.norm(rhs) / (root * np.linalg.norm(matrix, 2))
    true = np.linalg.norm(rhs - matrix @ x)
    assert true <= np.linalg.norm(rhs) * (1 + root)
    if solver in LEAST_SQUARES.values():
        assert true == pytest.approx(residual, rel=0.01)


@each_dtype
@each_solver
@pytest.mark.parametrize("matrix", SMALL.values(), ids=SMALL)
def test_three_unknowns(backend, solver, matrix, dtype):
    for rhs in (np.array([1.0, -1.0, 2.0]), np.array([1.0, 2.0, 3.0])):
        check(backend, solver, dtype, matrix, rhs, is_symmetric=True)


@each_dtype
@each_solver
@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "not symmetric"])
def test_random_systems(backend, solver, dtype, is_symmetric):
    if is_symmetric or "symmetric" not in solver.requires:
        for seed in range(30):
            check(backend, solver, dtype, *random_system(seed, is_symmetric), is_symmetric)


@pytest.mark.parametrize("solver", [bl.MINRES(maxiter=2000), bl.GMRES(restart=50)], ids=lambda s: s.name)
def test_a_system_too_ill_conditioned_for_float32_leaves_less_than_zero_does(backend, solver):
    """Without a limit of its distance, MINRES would lose its accuracy and return zero."""
    matrix = symmetric(np.geomspace(1e-6, 1, 50)).astype(np.float32)
    rhs = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    x, info = solve(backend, solver, matrix, rhs)
    assert info.status == Status.MAXITER
    true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
    assert true <= (0.7 if isinstance(solver, bl.MINRES) else 0.05) * np.linalg.norm(rhs)


@each_dtype
@pytest.mark.parametrize("solver", [bl.CG(), bl.MINRES(), bl.GMRES(), bl.BiCGStab()], ids=lambda s: s.name)
def test_an_ill_conditioned_solution_stays_within_reach(backend, solver, dtype):
    """As far as the dtype can confirm it: the condition number times its epsilon is below a tenth of the tolerance."""
    smallest = 20 * float(np.finfo(dtype).eps) / 1e-2 if not isinstance(solver, bl.MINRES) else 1e-3
    matrix, rhs = np.diag([1.0, smallest]).astype(dtype), np.array([1.0, 1.0], dtype)
    x, info = solve(backend, bl.get_solver(solver, rtol=1e-2), matrix, rhs)
    assert info.status == Status.CONVERGED
    assert np.linalg.norm(rhs - matrix @ x) <= 1e-2 * np.linalg.norm(rhs)


@each_dtype
@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "not symmetric"])
def test_the_normal_equations_give_the_solution_of_least_norm(backend, dtype, is_symmetric):
    """Also where no solution exists: the pseudoinverse, by NumPy."""
    for seed in range(3):
        matrix, rhs = random_system(seed, is_symmetric)
        expected = np.linalg.lstsq(matrix, rhs, rcond=1e-10)[0]
        for b in (rhs, matrix @ expected):  # without a solution, and with many
            solver = bl.NormalCG(maxiter=500, rtol=1e-12 if dtype is np.float64 else 1e-5)
            x, info = solve(backend, solver, matrix.astype(dtype), b.astype(dtype), symmetric=is_symmetric)
            assert info.status == (Status.MAXITER if b is rhs else Status.CONVERGED)
            # The condition number is at most 100, and enters squared where no solution exists.
            assert np.linalg.norm(x - expected) <= 1e5 * float(np.finfo(dtype).eps) * np.linalg.norm(expected)
