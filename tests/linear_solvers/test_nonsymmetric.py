"""GMRES, BiCGStab and CG on the normal equations against SciPy, on matrices that need not be symmetric."""

import numpy as np
import pytest
from frameworks import DTYPES, relative_error, solve, symmetric, tolerance
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 5, 12])


def matrix_of(singular_values, seed=0):
    """Return a matrix with these singular values between random orthogonal ones."""
    n, rng = len(singular_values), np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return left @ np.diag(singular_values) @ right


def rhs_of(size, seed=1):
    return np.random.default_rng(seed).standard_normal(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [bl.GMRES(restart=12), bl.NormalCG()], ids=["gmres", "normal-cg"])
@given(
    singular_values=sizes.flatmap(lambda n: st.lists(st.floats(0.2, 5.0), min_size=n, max_size=n)),
    seed=seeds,
    damping=st.sampled_from([0.0, 6.0]),
)
def test_some_match_scipy_on_any_invertible_matrix(backend, dtype, solver, singular_values, seed, damping):
    n = len(singular_values)
    matrix, rhs = matrix_of(singular_values, seed).astype(dtype), rhs_of(n, seed).astype(dtype)
    rtol = tolerance(dtype, factor=50)
    x, info = solve(backend, bl.get_solver(solver, rtol=rtol, damping=damping), matrix, rhs, symmetric=False)
    exact = linalg.solve(matrix.astype(np.float64) + damping * np.eye(n), rhs)
    assert info.status == Status.CONVERGED
    assert x.dtype == dtype
    assert relative_error(x, exact) <= 100 * rtol


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [bl.BiCGStab(), bl.GMRES(restart=4, max_restarts=100)], ids=["bicgstab", "gmres(4)"])
@given(n=sizes, seed=seeds, damping=st.sampled_from([0.0, 1.0]))
def test_both_match_scipy_where_the_symmetric_part_is_positive(backend, dtype, solver, n, seed, damping):
    # Eigenvalues in the right half plane: what these two promise. A fixed point that contracts is of this kind.
    rng = np.random.default_rng(seed)
    matrix = (1.5 * np.eye(n) - matrix_of(rng.uniform(0, 1, n), seed)).astype(dtype)
    rhs = rhs_of(n, seed).astype(dtype)
    rtol = tolerance(dtype, factor=50)
    x, info = solve(backend, bl.get_solver(solver, rtol=rtol, damping=damping), matrix, rhs)
    exact = linalg.solve(matrix.astype(np.float64) + damping * np.eye(n), rhs)
    assert info.status == Status.CONVERGED
    assert relative_error(x, exact) <= 10 * rtol


@pytest.mark.parametrize("cycle", [1, 4, 8])
def test_gmres_minimizes_the_residual_over_the_krylov_space(backend, cycle):
    matrix, rhs = matrix_of(np.linspace(0.5, 2, 12)), rhs_of(12)
    x, info = solve(backend, bl.GMRES(restart=cycle, max_restarts=1), matrix, rhs)
    krylov = [rhs]
    for _ in range(cycle - 1):
        krylov.append(matrix @ krylov[-1])
    basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
    best = basis @ np.linalg.lstsq(matrix @ basis, rhs)[0]
    assert relative_error(x, best) <= 1e-10
    assert (info.steps, info.status) == (cycle, Status.MAXITER)
    assert info.residual_norm == pytest.approx(np.linalg.norm(rhs - matrix @ x))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, exponent=st.floats(0, 10), kind=st.sampled_from(["invertible", "indefinite", "singular", "cyclic"]))
def test_converged_is_never_a_lie(backend, dtype, seed, exponent, kind):
    values = np.geomspace(1, 10.0**-exponent, 25)
    if kind == "singular":
        values[12:] = 0
    matrix = matrix_of(values, seed)
    if kind == "indefinite":
        matrix = symmetric(values * np.where(np.arange(25) % 3, 1, -1), seed)
    if kind == "cyclic":  # restarted GMRES stands still on it, BiCGStab breaks down
        matrix = np.roll(np.eye(25), 1, axis=0)
    matrix, rhs = matrix.astype(dtype), rhs_of(25, seed).astype(dtype)
    for solver in (bl.GMRES(restart=10, rtol=1e-6), bl.BiCGStab(rtol=1e-6)):
        x, info = solve(backend, solver, matrix, rhs)
        true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
        if info.status == Status.CONVERGED:
            assert true <= 10 * max(solver.rtol, np.finfo(dtype).eps) * np.linalg.norm(rhs)
        else:
            assert info.status == Status.MAXITER
            assert true <= np.linalg.norm(rhs) * (1 + tolerance(dtype))  # the best iterate, and zero is one
            rounding = tolerance(dtype) * (np.linalg.norm(x) + np.linalg.norm(rhs))
            assert abs(info.residual_norm - true) <= 0.1 * true + rounding


def test_a_cycle_of_one_breaks_no_restart(backend):
    # A rotation by 90 degrees: A r is orthogonal to r, so that no step of one dimension helps.
    x, info = solve(backend, bl.GMRES(restart=1), np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([1.0, 0.0]))
    assert info.status == Status.MAXITER
    assert info.steps == 1
    assert info.residual_norm == pytest.approx(1)
    x, info = solve(backend, bl.GMRES(restart=2), np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([1.0, 0.0]))
    assert info.status == Status.CONVERGED
    assert x == pytest.approx([0, 1])


@pytest.mark.parametrize("solver", [bl.GMRES(restart=3), bl.BiCGStab()], ids=["gmres", "bicgstab"])
def test_a_null_direction_without_solution_does_not_converge(backend, solver):
    x, info = solve(backend, solver, np.diag([1.0, 2.0, 0.0]), np.ones(3))
    assert info.status == Status.MAXITER
    assert info.residual_norm >= 1 - 1e-9
    assert np.isfinite(x).all()


def test_neumann_allows_a_transient_but_no_growth(backend):
    def run(contraction):
        matrix, rhs = np.eye(2) - contraction, np.array([1.0, 1.0])
        x, info = solve(backend, bl.Neumann(terms=80), matrix, rhs, symmetric=False)
        return x, info.status, np.linalg.solve(matrix, rhs)

    x, status, exact = run(np.array([[0.5, 20.0], [0.0, 0.5]]))  # the second term is twenty times the first
    assert status == Status.CONVERGED
    assert relative_error(x, exact) <= 1e-12
    _, status, _ = run(np.array([[1.01, 0.0], [0.0, 0.5]]))
    assert status == Status.DIVERGED
