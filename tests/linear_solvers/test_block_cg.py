"""CG for many right-hand sides: against dense solutions, with fewer steps, and where the block cannot solve a row."""

import numpy as np
import pytest
from frameworks import DTYPES, relative_error, symmetric, tolerance

import bilevel as bl
from bilevel import Status
from bilevel.linear_solvers.auto_damping import SLACK
from bilevel.linear_solvers.linear_solver import run_solver, run_solver_on_rows
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.rows import Rows

N, Q = 40, 8
SPD = symmetric(np.logspace(0, 3, N))
B = np.random.default_rng(1).standard_normal((Q, N))


def _rows(backend, solver, matrix, b, x0):
    """Solve for rows {"a": (Q, 1, N - 3), "b": (Q, 3)} that are cut out of one array."""
    inside = backend.by_rows
    of_row = inside.space({"a": b["a"][0], "b": b["b"][0]})
    A = LinearOperator(of_row, lambda v: of_row.unravel(matrix @ of_row.ravel(v)))
    return run_solver_on_rows(solver, A, b, x0, Rows(of_row, backend.space(b), inside.batched))


def _single(backend, solver, matrix, b):
    return run_solver(solver, LinearOperator(backend.space(b), lambda v: matrix @ v), b)


def cut(backend, b):
    return {"a": backend.from_numpy(b[:, None, :-3].copy()), "b": backend.from_numpy(b[:, -3:].copy())}


def solve(backend, solver, matrix, b, x0=None):
    start = None if x0 is None else cut(backend, x0)
    with np.errstate(all="ignore"):
        x, info = backend.run(_rows, solver, backend.from_numpy(matrix), cut(backend, b), start)
    found = np.concatenate([backend.to_numpy(x["a"])[:, 0], backend.to_numpy(x["b"])], 1)
    return found, bl.SolverInfo(*map(backend.to_numpy, info))


def single(backend, solver, matrix, b):
    with np.errstate(all="ignore"):
        x, info = backend.run(_single, solver, backend.from_numpy(matrix), backend.from_numpy(b))
    return backend.to_numpy(x), info


def residuals(matrix, x, b, damping=0.0):
    x = x.astype(np.float64)
    return np.linalg.norm(b - x @ matrix - damping * x, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_are_solved_in_fewer_steps_than_one_by_itself(backend, dtype):
    rtol = 1e-10 if dtype == np.float64 else 1e-4
    x, info = solve(backend, bl.CG(rtol=rtol, damping=0.0), SPD.astype(dtype), B.astype(dtype))
    alone = single(backend, bl.CG(rtol=rtol, damping=0.0), SPD.astype(dtype), B[0].astype(dtype))[1]
    assert info.status.tolist() == [Status.CONVERGED] * Q
    assert info.steps.max() <= int(alone.steps) / 3
    assert (info.residual_norm <= rtol * info.rhs_norm).all()
    assert (residuals(SPD, x, B) <= 1.5 * rtol * np.linalg.norm(B, axis=1)).all()
    assert relative_error(x, np.linalg.solve(SPD, B.T).T) <= 1e3 * rtol
    assert x.dtype == dtype


def test_dependent_rows_are_solved(backend):
    """Equal, opposite, tiny, huge and zero rows, and more rows than dimensions."""
    b = np.stack([B[0], B[0], -2 * B[0], B[0] + 1e-9 * B[1], 1e-40 * B[1], 1e40 * B[2], 0 * B[0], B[1] + B[0]])
    x, info = solve(backend, bl.CG(rtol=1e-9, damping=0.0), SPD, b)
    assert info.status.tolist() == [Status.CONVERGED] * Q
    assert (residuals(SPD, x, b) <= 1.1e-9 * np.linalg.norm(b, axis=1)).all()
    assert info.steps[6] == 0
    many = np.random.default_rng(2).standard_normal((7, 4))
    matrix = symmetric([1.0, 2.0, 3.0, 40.0])
    x, info = solve(backend, bl.CG(rtol=1e-10, damping=0.0), matrix, many)
    assert relative_error(x, np.linalg.solve(matrix, many.T).T) <= 1e-9
    assert info.steps.max() <= 2


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e150])
def test_the_units_of_the_operator_do_not_matter(backend, scale):
    x, info = solve(backend, bl.CG(rtol=1e-9, damping=0.0), scale * SPD, B)
    assert info.status.tolist() == [Status.CONVERGED] * Q
    assert relative_error(scale * x, np.linalg.solve(SPD, B.T).T) <= 1e-7


def test_a_preconditioner_saves_steps(backend):
    plain = solve(backend, bl.CG(rtol=1e-9, damping=0.1), SPD, B)[1]
    sketched = bl.CG(rtol=1e-9, damping=0.1, preconditioner=bl.NystromPreconditioner(rank=20))
    x, info = solve(backend, sketched, SPD, B)
    assert relative_error(x, np.linalg.solve(SPD + 0.1 * np.eye(N), B.T).T) <= 1e-7
    assert info.steps.max() < plain.steps.max()
    assert info.damping.tolist() == [0.1] * Q


def test_a_warm_start_helps_its_row(backend):
    exact = np.linalg.solve(SPD, B.T).T
    start = np.where(np.arange(Q)[:, None] < 3, exact, 0.0)
    x, info = solve(backend, bl.CG(rtol=1e-9, damping=0.0), SPD, B, start)
    assert not info.steps[:3].any()
    assert info.steps[3:].all()
    assert relative_error(x, exact) <= 1e-7


def test_too_few_steps_are_reported_with_the_true_residual(backend):
    x, info = solve(backend, bl.CG(maxiter=2, damping=0.0), SPD, B)
    assert info.status.tolist() == [Status.MAXITER] * Q
    assert info.steps.tolist() == [2] * Q
    np.testing.assert_allclose(info.residual_norm, residuals(SPD, x, B), rtol=1e-8)
    assert solve(backend, bl.CG(maxiter=0, damping=0.0), SPD, B)[1].status.tolist() == [Status.MAXITER] * Q


def test_a_budget_of_steps_is_as_in_single_solves(backend):
    solver = bl.CG(maxiter=3, rtol=None, damping=0.0)
    x, info = solve(backend, solver, SPD, B)
    assert relative_error(x[2], single(backend, solver, SPD, B[2])[0]) <= 1e-12
    assert info.steps.tolist() == [3] * Q


def test_rows_that_meet_negative_curvature_are_as_in_single_solves(backend):
    """Rows 0 to 3 have no component along the negative eigenvector. They are solved."""
    matrix = symmetric(np.r_[-1.0, np.linspace(1, 2, N - 1)])
    vector = np.linalg.eigh(matrix)[1][:, 0]
    b = B - (B @ vector)[:, None] * vector * (np.arange(Q) < 4)[:, None]
    b[7] = 3 * vector
    solver = bl.CG(rtol=1e-8, damping=0.0)
    x, info = solve(backend, solver, matrix, b)
    failed = Status.NEGATIVE_CURVATURE
    assert info.status.tolist() == [Status.CONVERGED] * 4 + [failed] * 4
    assert (residuals(matrix, x, b)[:4] <= 1.1e-8 * np.linalg.norm(b[:4], axis=1)).all()
    np.testing.assert_allclose(info.residual_norm, residuals(matrix, x, b), rtol=1e-6, atol=1e-7)
    for q in (5, 7):
        assert relative_error(x[q], single(backend, solver, matrix, b[q])[0]) <= 1e-6
    assert relative_error(x[7], b[7]) <= 1e-8  # over its absolute curvature


def test_one_automatic_damping_serves_all_rows_that_need_one(backend):
    matrix = symmetric(np.r_[-0.5, np.linspace(1, 20, N - 1)])
    vector = np.linalg.eigh(matrix)[1][:, 1]
    b = B.copy()
    b[0] = vector  # is solved before the negative curvature is met
    x, info = solve(backend, bl.CG(), matrix, b)
    assert info.status.tolist() == [Status.CONVERGED] * Q
    np.testing.assert_allclose(info.damping, [0.0] + [1.0] * (Q - 1), atol=1e-3)
    limits = np.maximum(1e-5 * np.linalg.norm(b, axis=1), 1.01 * SLACK * info.damping * np.linalg.norm(x, axis=1))
    for q in range(Q):
        assert residuals(matrix, x[q : q + 1], b[q : q + 1], info.damping[q])[0] <= limits[q]


def test_a_convex_system_gets_no_automatic_damping(backend):
    x, info = solve(backend, bl.CG(rtol=1e-9), SPD, B)
    assert not info.damping.any()
    assert relative_error(x, np.linalg.solve(SPD, B.T).T) <= 1e-6


@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_nan_and_infinity_stay_in_their_rows(backend, damping):
    b = B.copy()
    b[1, 0], b[4, -1] = np.nan, np.inf
    x, info = solve(backend, bl.CG(rtol=1e-9, damping=damping), SPD, b)
    assert info.status.tolist() == [4 if q in (1, 4) else 0 for q in range(Q)]
    others = [q for q in range(Q) if q not in (1, 4)]
    shift = 0.0 if damping == "auto" else damping
    assert relative_error(x[others], np.linalg.solve(SPD + shift * np.eye(N), b[others].T).T) <= 1e-6
    assert np.isnan(x[1]).all()
    broken = SPD.copy()
    broken[3, 3] = np.nan
    x, info = solve(backend, bl.CG(damping=damping), broken, B)
    assert info.status.tolist() == [Status.NON_FINITE] * Q
    assert np.isnan(x).all()


def test_a_tolerance_near_rounding_is_claimed_only_if_met(backend):
    matrix, b = SPD.astype(np.float32), B.astype(np.float32)
    x, info = solve(backend, bl.CG(rtol=3e-6, damping=0.0), matrix, b)
    size, done = np.linalg.norm(b, axis=1), info.status == Status.CONVERGED
    left = residuals(matrix.astype(np.float64), x, b)
    noise = tolerance(np.float32, factor=4) * np.linalg.norm(matrix, 2) * np.linalg.norm(x, axis=1)
    assert (left[done] <= 3e-6 * size[done] + noise[done]).all()
    assert (np.abs(left - info.residual_norm) <= noise).all()
    assert (left <= 1e-4 * size).all()


def test_gram_and_combine_are_products_of_matrices(backend):
    rng = np.random.default_rng(3)
    x, y, M = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 4)), rng.standard_normal((5, 3))
    one = {"a": backend.from_numpy(x), "b": backend.from_numpy(x[:, 0, :1].copy())}
    two = {"a": backend.from_numpy(y), "b": backend.from_numpy(y[:, 1, :1].copy())}
    matrix = backend.from_numpy(M)
    space = backend.space(one)
    flat = [np.concatenate([z.reshape(3, 8), z[:, i, :1]], 1) for i, z in ((0, x), (1, y))]
    np.testing.assert_allclose(backend.to_numpy(space.gram(one, two)), flat[0] @ flat[1].T, rtol=1e-12)
    combined = space.combine(matrix, one)
    np.testing.assert_allclose(backend.to_numpy(combined["a"]), np.tensordot(M, x, 1), rtol=1e-12)
    half = backend.space({"a": backend.from_numpy(x.astype(np.float16))})
    wide = backend.to_numpy(half.gram(half.like, half.like))
    assert wide.dtype == np.float32
    narrow = half.combine(backend.from_numpy(M.astype(np.float32)), half.like)["a"]
    assert backend.to_numpy(narrow).dtype == np.float16
