"""``info.residual_norm`` is the residual of the system that was asked for, or nan; a zero Hessian is not CONVERGED."""

import cases
import numpy as np
import pytest
from frameworks import DTYPES, solve, symmetric

import bilevel as bl
from bilevel import Status

SIZE = 6
SOLVERS = {
    "cg": bl.CG(rtol=1e-3),
    "cg, damped": bl.CG(rtol=1e-3, damping=0.3),
    "cg, truncated": bl.CG(maxiter=2),
    "cg, a budget": bl.CG(maxiter=2, rtol=None),
    "cg, preconditioned": bl.CG(rtol=1e-3, damping=0.1, preconditioner=bl.DiagonalPreconditioner()),
    "cg, a sketch": bl.CG(maxiter=2, damping=0.1, preconditioner=bl.NystromPreconditioner(rank=2)),
    "minres": bl.MINRES(rtol=1e-3),
    "minres, truncated": bl.MINRES(maxiter=2, damping=0.3),
    "gmres": bl.GMRES(rtol=1e-3, damping=0.3),
    "gmres, restarted": bl.GMRES(restart=2, max_restarts=2),
    "bicgstab": bl.BiCGStab(rtol=1e-3, damping=0.3),
    "bicgstab, truncated": bl.BiCGStab(maxiter=2),
    "neumann, a tolerance": bl.Neumann(terms=300, rtol=1e-2, damping=0.1),
    "neumann, too short": bl.Neumann(terms=2, rtol=1e-6),
    "nystrom": bl.Nystrom(rank=2, damping=0.5),
    "exact": bl.Exact(damping=0.3),
}
SPECTRA = {
    "definite": [0.1, 0.5, 1.0, 1.5, 2.0, 3.0],
    "indefinite": [-1.0, -0.5, 0.5, 1.0, 2.0, 3.0],
    "singular": [0.0, 0.0, 0.5, 1.0, 2.0, 3.0],
    "zero": [0.0] * SIZE,
    "ill-conditioned": [1e-5, 1e-4, 1e-2, 0.1, 1.0, 3.0],
}


def damped(info, matrix):
    return matrix + info.damping * np.eye(SIZE)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_residual_is_that_of_the_system(backend, solver, dtype):
    """From zero and from a start. JAX compiles each of them: it has one for each dtype, and the others have both."""
    rng = np.random.default_rng(0)
    starts = [dtype is np.float64] if backend.compiles else [False, True]
    for eigenvalues in SPECTRA.values():
        matrix = symmetric(eigenvalues).astype(dtype)
        for size in (1.0, 1e-12):
            rhs = (size * rng.standard_normal(SIZE)).astype(dtype)
            start = (size * rng.standard_normal(SIZE)).astype(dtype)
            for x0 in (start if given else None for given in starts):
                x, info = solve(backend, solver, matrix, rhs, x0)
                exact = damped(info, matrix.astype(np.float64))
                x = x.astype(np.float64)
                true = np.linalg.norm(rhs - exact @ x)
                rounding = np.linalg.norm(exact, 2) * np.linalg.norm(x) + np.linalg.norm(rhs)
                assert abs(info.residual_norm - true) <= 20 * float(np.finfo(dtype).eps) * rounding + 1e-4 * true
                assert info.rhs_norm == pytest.approx(np.linalg.norm(rhs), rel=1e-5)


def test_identity_does_not_know_it(backend):
    _, info = solve(backend, bl.Identity(), np.eye(SIZE), np.ones(SIZE))
    assert np.isnan(info.residual_norm)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("eigenvalues", [SPECTRA["definite"], SPECTRA["singular"], SPECTRA["indefinite"]])
def test_neumann_gives_the_residual_without_its_last_term(backend, eigenvalues, damping):
    """After a term that grows, it gives the residual of v, which does not have this term."""
    matrix, rhs = symmetric(eigenvalues), np.ones(SIZE)
    x, info = solve(backend, bl.Neumann(terms=30, step_size=0.25, damping=damping), matrix, rhs)
    if info.status == Status.CONVERGED:
        x, _ = solve(backend, bl.Neumann(terms=29, step_size=0.25, damping=damping), matrix, rhs)
    true = np.linalg.norm(rhs - (matrix + damping * np.eye(SIZE)) @ x)
    assert info.residual_norm == pytest.approx(true, rel=1e-9)


def test_neumann_on_batches_does_not_know_it(backend):
    case = cases.ridge(backend, 12, 3)
    X, y = case.args["inner_args"]
    batches = [(X[:6], y[:6]), (X[6:], y[6:])]
    hg = case.hypergradient(bl.Neumann(terms=5, step_size=0.1), inner_args=batches)
    assert hg.info.status == Status.CONVERGED
    assert np.isnan(hg.info.residual_norm)


class TestNoCurvature:
    """A Hessian that is zero, as with weights of examples that start at zero."""

    @pytest.mark.parametrize("rtol", [0.0, None, 1e-3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    def test_neumann(self, backend, dtype, rtol):
        rhs = np.array([1.0, -2.0, 0.5, 1.0, 0.0, 3.0], dtype)
        for eigenvalues in ([0.0] * SIZE, [0, 0, 0, 0, 1.0, 0]):
            _, info = solve(backend, bl.Neumann(terms=9, rtol=rtol), np.diag(eigenvalues).astype(dtype), rhs)
            assert info.status == Status.NEGATIVE_CURVATURE
            assert info.residual_norm == pytest.approx(info.rhs_norm)
        _, info = solve(backend, bl.Neumann(terms=9, damping=0.1), np.zeros((SIZE, SIZE), dtype), rhs)
        assert info.status == Status.CONVERGED
        zero, info = solve(backend, bl.Neumann(terms=9, rtol=rtol), np.zeros((SIZE, SIZE), dtype), 0 * rhs)
        assert info.status == Status.CONVERGED
        assert not zero.any()

    def test_a_step_that_does_not_move_does_not_contract(self, backend):
        _, info = solve(backend, bl.Neumann(terms=9), np.zeros((SIZE, SIZE)), np.ones(SIZE), symmetric=False)
        assert info.status == Status.DIVERGED

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
    def test_nystrom(self, backend, dtype):
        rhs = np.ones(SIZE, dtype)
        for matrix in (np.zeros((SIZE, SIZE), dtype), -np.eye(SIZE, dtype=dtype)):
            _, info = solve(backend, bl.Nystrom(rank=3), matrix, rhs)
            assert info.status == Status.NEGATIVE_CURVATURE
        _, info = solve(backend, bl.Nystrom(rank=3), np.zeros((SIZE, SIZE), dtype), 0 * rhs)
        assert info.status == Status.CONVERGED
        _, info = solve(backend, bl.Nystrom(rank=3, damping=10.0), np.diag(np.full(SIZE, 1e-3, dtype)), rhs)
        assert info.status == Status.CONVERGED

    @pytest.mark.parametrize("solver", ["cg", "neumann", "nystrom"])
    def test_the_message_speaks_of_zero_curvature(self, backend, solver):
        problem, w, h = cases.diagonal([0.0, 0.0], backend)
        with pytest.warns(
            bl.SolverWarning, match=r"met non-positive curvature.*negative eigenvalues, but no zero ones"
        ):
            bl.hypergradient(problem, w, h, solver=solver)
        with pytest.raises(bl.SolverError) as caught:
            bl.hypergradient(problem, w, h, solver=solver, on_failure="raise")
        assert "met zero curvature. The Hessian is zero" in str(caught.value)
        assert 'solver="minres" does not help' in str(caught.value)

    def test_a_block_of_zeros_does_not_advise_minres(self, backend):
        problem, w, h = cases.diagonal([1.0, 2.0, 0.0], backend)
        with pytest.raises(
            bl.SolverError, match=r"smallest is zero or slightly negative\): add damping above 0\.002, or"
        ):
            bl.hypergradient(problem, w, h, solver="cg", on_failure="raise")
        with pytest.warns(bl.SolverWarning, match=r"MINRES: stagnated.*Loosen rtol or add damping\. If params is not"):
            bl.hypergradient(problem, w, h, solver="minres")


def test_one_step_is_one_step(backend):
    problem, w, h = cases.diagonal([1.0, 2.0, 3.0], backend)
    with pytest.raises(bl.SolverError, match=r"stopped after 1 step above its tolerance.*after 1 step\. Run"):
        bl.hypergradient(problem, w, h, solver=bl.CG(maxiter=1), on_failure="raise")
    with pytest.raises(bl.SolverError, match=r"stopped after 2 steps above its tolerance.*after 2 steps\. Run"):
        bl.hypergradient(problem, w, h, solver=bl.CG(maxiter=2), on_failure="raise")
