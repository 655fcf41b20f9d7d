"""Each linear solver against SciPy, on what it promises and on what it does not."""

from importlib.util import find_spec

import numpy as np
import pytest
from frameworks import DTYPES, FRAMEWORKS, framework, relative_error, solve, symmetric, tolerance
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status
from bilevel.linear_solvers.auto_damping import SLACK

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 5, 12])  # few: JAX compiles for each
spectra = sizes.flatmap(lambda n: st.lists(st.floats(0.2, 5.0), min_size=n, max_size=n))


def rhs_of(size, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(eigenvalues=spectra, seed=seeds, damping=st.sampled_from([0.0, 0.5]))
def test_cg_matches_scipy_on_positive_definite_systems(backend, dtype, eigenvalues, seed, damping):
    matrix, rhs = symmetric(eigenvalues, seed).astype(dtype), rhs_of(len(eigenvalues), seed, dtype)
    rtol = tolerance(dtype, factor=50)
    x, info = solve(backend, bl.CG(rtol=rtol, damping=damping), matrix, rhs)
    exact = linalg.solve(matrix.astype(np.float64) + damping * np.eye(len(rhs)), rhs)
    assert info.status == Status.CONVERGED
    assert x.dtype == dtype
    # norm(x - x*) <= κ rtol norm(x*) for a residual below rtol norm(b); and the matrix itself is rounded.
    assert relative_error(x, exact) <= 200 * rtol


@pytest.mark.parametrize("dtype", DTYPES)
@given(eigenvalues=spectra, seed=seeds, damping=st.sampled_from([0.0, 0.1]))
def test_minres_matches_scipy_on_indefinite_systems(backend, dtype, eigenvalues, seed, damping):
    signs = np.where(np.arange(len(eigenvalues)) % 3, -1, 1)
    matrix, rhs = symmetric(eigenvalues * signs, seed).astype(dtype), rhs_of(len(eigenvalues), seed, dtype)
    # Its short recurrences attain eps κ² (Sleijpen, van der Vorst & Modersitzki 2000), here with κ <= 51.
    rtol = tolerance(dtype, factor=1000)
    x, info = solve(backend, bl.MINRES(rtol=rtol, damping=damping), matrix, rhs)
    exact = linalg.solve(matrix.astype(np.float64) + damping * np.eye(len(rhs)), rhs)
    assert info.status == Status.CONVERGED
    assert x.dtype == dtype
    assert relative_error(x, exact) <= 51 * rtol


@pytest.mark.parametrize("dtype", DTYPES)
@given(eigenvalues=spectra, seed=seeds)
def test_exact_matches_scipy(backend, dtype, eigenvalues, seed):
    signs = np.where(np.arange(len(eigenvalues)) % 2, -1, 1)  # indefinite is fine
    matrix, rhs = symmetric(eigenvalues * signs, seed).astype(dtype), rhs_of(len(eigenvalues), seed, dtype)
    x, info = solve(backend, bl.Exact(), matrix, rhs)
    assert info.status == Status.CONVERGED
    assert relative_error(x, linalg.solve(matrix.astype(np.float64), rhs)) <= tolerance(dtype, condition=100)


@given(eigenvalues=spectra, seed=seeds, terms=st.integers(0, 30), share=st.floats(0.1, 1.9))
def test_neumann_is_the_truncated_series(backend, eigenvalues, seed, terms, share):
    matrix, rhs = symmetric(eigenvalues, seed), rhs_of(len(eigenvalues), seed)
    step = share / max(eigenvalues)
    x, info = solve(backend, bl.Neumann(terms=terms, step_size=step), matrix, rhs)
    term, total = rhs, rhs
    for _ in range(terms):
        term = term - step * matrix @ term
        total = total + term
    assert relative_error(x, step * total) <= tolerance(np.float64)
    assert info.steps == terms
    assert info.status == Status.CONVERGED
    assert info.residual_norm == pytest.approx(np.linalg.norm(term), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@given(eigenvalues=spectra, seed=seeds)
def test_neumann_with_automatic_step_converges_to_the_solution(backend, dtype, eigenvalues, seed):
    matrix, rhs = symmetric(eigenvalues, seed).astype(dtype), rhs_of(len(eigenvalues), seed, dtype)
    x, info = solve(backend, bl.Neumann(terms=800), matrix, rhs)
    assert info.status == Status.CONVERGED
    assert relative_error(x, linalg.solve(matrix.astype(np.float64), rhs)) <= tolerance(dtype, condition=100)


def test_identity_is_a_multiple_of_the_right_hand_side(backend):
    rhs = rhs_of(3)
    x, info = solve(backend, bl.Identity(scale=0.25), np.eye(3), rhs)
    assert relative_error(x, 0.25 * rhs) <= tolerance(np.float64)
    assert info.steps == 0
    assert np.isnan(info.residual_norm)


@pytest.mark.parametrize("solver", [bl.CG(), bl.MINRES(), bl.Neumann(terms=50), bl.Exact()], ids=repr)
def test_the_reported_residual_is_true(backend, solver):
    matrix, rhs = symmetric(np.geomspace(0.01, 1, 20)), rhs_of(20)
    x, info = solve(backend, solver, matrix, rhs)
    true = np.linalg.norm(rhs - matrix @ x)
    if isinstance(solver, bl.Neumann):  # one term behind, a bound
        assert 0.5 * info.residual_norm <= true <= info.residual_norm
    else:
        assert abs(info.residual_norm - true) <= 1e-10 * np.linalg.norm(rhs)
    assert info.rhs_norm == pytest.approx(np.linalg.norm(rhs))


def test_cg_takes_as_many_steps_as_there_are_distinct_eigenvalues(backend):
    _, info = solve(backend, bl.CG(rtol=1e-10), symmetric([1, 1, 1, 5, 5, 9]), rhs_of(6))
    assert info.steps == 3
    assert info.status == Status.CONVERGED


@pytest.mark.parametrize("maxiter", [1, 4, 8])
def test_cg_minimizes_the_energy_norm_over_the_krylov_space(backend, maxiter):
    matrix, rhs = symmetric(np.geomspace(1e-2, 1, 12)), rhs_of(12)
    x, _ = solve(backend, bl.CG(maxiter=maxiter, rtol=0.0), matrix, rhs)
    krylov = [rhs]
    for _ in range(maxiter - 1):
        krylov.append(matrix @ krylov[-1])
    basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
    best = basis @ linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs)
    assert relative_error(x, best) <= 1e-8


@pytest.mark.parametrize("maxiter", [1, 4, 8])
def test_minres_minimizes_the_residual_over_the_krylov_space(backend, maxiter):
    matrix, rhs = symmetric(np.linspace(-1, 2, 12)), rhs_of(12)
    x, _ = solve(backend, bl.MINRES(maxiter=maxiter, rtol=0.0), matrix, rhs)
    krylov = [rhs]
    for _ in range(maxiter - 1):
        krylov.append(matrix @ krylov[-1])
    basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
    best = basis @ np.linalg.lstsq(matrix @ basis, rhs)[0]
    assert relative_error(x, best) <= 1e-7


class TestNegativeCurvature:
    def test_cg_stops_at_the_last_good_iterate(self, backend):
        # The negative direction is nearly orthogonal to b: the first steps are good ones.
        matrix, rhs = np.diag([1.0, 2.0, 3.0, -1.0]), np.array([1.0, 1.0, 1.0, 1e-3])
        x, info = solve(backend, bl.CG(damping=0.0), matrix, rhs)
        assert info.status == Status.NEGATIVE_CURVATURE
        assert info.steps > 1
        assert np.linalg.norm(rhs - matrix @ x) < np.linalg.norm(rhs)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [1, 5])
    def test_at_the_first_step_it_is_never_a_quiet_zero(self, backend, dtype, size):
        rhs = rhs_of(size, dtype=dtype)
        x, info = solve(backend, bl.CG(damping=0.0), -4 * np.eye(size, dtype=dtype), rhs)
        assert info.status == Status.NEGATIVE_CURVATURE
        assert relative_error(x, rhs / 4) <= tolerance(dtype)
        assert info.residual_norm == pytest.approx(2 * np.linalg.norm(rhs), rel=1e-5)

    def test_a_zero_operator_is_no_curvature(self, backend):
        x, info = solve(backend, bl.CG(), np.zeros((3, 3)), rhs_of(3))
        assert info.status == Status.NEGATIVE_CURVATURE
        assert np.isfinite(x).all()
        assert x.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(seed=seeds, null=st.sampled_from([1, 5]))
    def test_a_singular_system_without_solution_does_not_converge(self, backend, dtype, seed, null):
        eigenvalues = np.concatenate([np.zeros(null), np.linspace(1, 2, 15)])
        matrix, rhs = symmetric(eigenvalues, seed).astype(dtype), rhs_of(15 + null, seed, dtype)
        in_range = np.linalg.pinv(matrix, rcond=1e-3) @ matrix @ rhs
        least = np.linalg.norm(rhs - in_range)
        assume(least > 0.05 * np.linalg.norm(rhs))
        for solver in (bl.CG(), bl.MINRES(), bl.Exact()):
            _, info = solve(backend, solver, matrix, rhs)
            assert info.status in (Status.NEGATIVE_CURVATURE, Status.MAXITER)
            assert info.residual_norm > 0.75 * least
            if isinstance(solver, bl.MINRES):  # it stops where rounding blurs the residual by a fifth
                assert info.residual_norm < 1.3 * least
            if isinstance(solver, bl.Exact):
                assert info.residual_norm == pytest.approx(least, rel=1e-3)

    def test_damping_cures_it(self, backend):
        matrix, rhs = symmetric([-0.5, 1, 2]), rhs_of(3)
        x, info = solve(backend, bl.CG(damping=1.0, rtol=1e-12), matrix, rhs)
        assert info.status == Status.CONVERGED
        assert relative_error(x, linalg.solve(matrix + np.eye(3), rhs)) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), seed=seeds)
def test_converged_is_never_a_lie(backend, dtype, data, seed):
    size = data.draw(st.sampled_from([1, 3, 25]))
    exponent = data.draw(st.floats(0, 10))
    signs = data.draw(st.sampled_from(["definite", "indefinite", "singular"]))
    eigenvalues = np.geomspace(1, 10.0**-exponent, size)
    if signs == "indefinite":
        eigenvalues[::3] *= -1
    if signs == "singular":
        eigenvalues[size // 2 :] = 0
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    matrix, rhs = (scale * symmetric(eigenvalues, seed)).astype(dtype), rhs_of(size, seed, dtype)
    rtol = data.draw(st.sampled_from([1e-3, 1e-6, 1e-9]))
    method = data.draw(st.sampled_from([bl.CG, bl.MINRES]))
    x, info = solve(backend, method(rtol=rtol, maxiter=300), matrix, rhs)
    true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x - info.damping * x)
    if info.status == Status.CONVERGED:
        accepted = SLACK * info.damping * np.linalg.norm(x)  # of an automatic damping
        assert true <= max(10 * max(rtol, np.finfo(dtype).eps) * np.linalg.norm(rhs), 1.01 * accepted)
    elif np.isfinite(true):
        rounding = tolerance(dtype) * (scale * np.linalg.norm(x) + np.linalg.norm(rhs))
        assert abs(info.residual_norm - true) <= 0.1 * true + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@given(eigenvalues=spectra, seed=seeds, share=st.floats(2.1, 4.0))
def test_neumann_divergence_is_flagged(backend, dtype, eigenvalues, seed, share):
    matrix, rhs = symmetric(eigenvalues, seed).astype(dtype), rhs_of(len(eigenvalues), seed, dtype)
    x, info = solve(backend, bl.Neumann(terms=500, step_size=share / max(eigenvalues)), matrix, rhs)
    assert info.status == Status.DIVERGED
    assert np.linalg.norm(x) <= info.steps * share / max(eigenvalues) * np.linalg.norm(rhs) * (1 + 1e-5)


@given(eigenvalues=spectra, seed=seeds)
def test_neumann_diverges_on_a_negative_eigenvalue_whatever_the_step(backend, eigenvalues, seed):
    matrix, rhs = symmetric([*eigenvalues, -0.1], seed), rhs_of(len(eigenvalues) + 1, seed)
    _, info = solve(backend, bl.Neumann(terms=1000), matrix, rhs)
    assert info.status == Status.DIVERGED


def test_solvers_agree_across_frameworks():
    backends = [framework(name) for name in FRAMEWORKS if find_spec(name)]
    if len(backends) == 1:
        pytest.skip("neither torch nor jax is installed")
    matrix, rhs = symmetric(np.geomspace(0.1, 1, 15)), rhs_of(15)
    for solver in (bl.CG(rtol=1e-13), bl.MINRES(rtol=1e-13), bl.Neumann(terms=500, step_size=1.0), bl.Exact()):
        first, *others = (solve(backend, solver, matrix, rhs)[0] for backend in backends)
        for x in others:
            assert relative_error(x, first) <= 1e-11
