"""Unrolls from a stationary point, where they are truncated Neumann series, and their adjoints."""

import numpy as np
import pytest
from cases import quadratic
from frameworks import framework, relative_error
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from unrolled_cases import OPTIMIZERS, WAYS, SquaredNorm

import bilevel as bl


class TestStationaryPoint:
    @given(seed=st.integers(0, 2**32 - 1), terms=st.sampled_from([1, 2, 7]), share=st.floats(0.1, 1.9))
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["numpy", "torch"])
    def test_unrolled_steps_are_neumann_terms(self, name, way, seed, terms, share):
        self.compare(framework(name), way, seed, terms, share)

    @pytest.mark.parametrize("way", WAYS)
    def test_unrolled_steps_are_neumann_terms_in_jax_too(self, way):
        for share in (0.3, 1.7):
            self.compare(framework("jax"), way, 0, 7, share)

    def compare(self, backend, way, seed, terms, share):
        """Theorem 2 of Lorraine et al. (2020): K steps sum the first K terms."""
        case = quadratic(backend, seed=seed).at
        series = bl.Neumann(terms=terms - 1, step_size=share / 4)
        unrolled = bl.Unrolled(steps=terms, step_size=share / 4, **WAYS[way])
        a, b = (bl.hypergradient(*case, solver=s) for s in (series, unrolled))
        for x, y in ((a.grad, b.grad), (a.adjoint, b.adjoint)):
            assert relative_error(backend.to_numpy(y), backend.to_numpy(x)) <= 1e-12

    def test_truncation_drops_the_early_steps(self, backend):
        case = quadratic(backend).at
        for way in WAYS.values():
            truncated = bl.Unrolled(steps=20, step_size=0.2, truncation=4, **way)
            short = bl.Unrolled(steps=4, step_size=0.2, **way)
            a, b = (bl.hypergradient(*case, solver=s) for s in (truncated, short))
            assert relative_error(backend.to_numpy(a.grad), backend.to_numpy(b.grad)) <= 1e-11

    @pytest.mark.parametrize("way", WAYS)
    def test_the_end_of_an_unroll_is_returned(self, backend, way):
        case = quadratic(backend, away=1.0)
        hg = case.hypergradient(bl.Unrolled(steps=300, **WAYS[way]))
        assert relative_error(backend.to_numpy(hg.params), case.minimum) <= 1e-10
        expected = linalg.solve(case.matrix, case.minimum - case.target)
        assert relative_error(backend.to_numpy(hg.adjoint), expected) <= 1e-10

    def test_the_adjoint_takes_the_batches_in_their_order(self, backend):
        """All have their minimum at w = λ, so that forward mode's, of steps taken at the end, is reverse mode's."""

        class Inner:  # ½ ‖X (w − λ)‖²
            def __call__(self, w, h, X):
                return ((X @ (w - h)) ** 2).sum() / 2

            def grad(self, w, h, X):
                return X.T @ (X @ (w - h))

            def hvp(self, w, h, v, X):
                return X.T @ (X @ v)

            def cross_vjp(self, w, h, v, X):
                return -X.T @ (X @ v)

            cross_jvp = cross_vjp

        rng = np.random.default_rng(0)
        batches = [(backend.from_numpy(rng.standard_normal((4, 3))),) for _ in range(3)]
        w, problem = backend.from_numpy(rng.standard_normal(3)), bl.Problem(Inner(), SquaredNorm())
        reverse, forward = (
            bl.hypergradient(
                problem,
                w,
                w + 0,
                inner_args=batches,
                solver=bl.Unrolled(steps=7, step_size=0.1, mode=mode),
                on_failure="ignore",
            )
            for mode in ("reverse", "forward")
        )
        for a, b in ((reverse.adjoint, forward.adjoint), (reverse.grad, forward.grad)):
            assert relative_error(backend.to_numpy(b), backend.to_numpy(a)) <= 1e-12
        assert forward.info.residual_norm == pytest.approx(reverse.info.residual_norm, rel=1e-12)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_the_residual_is_that_of_the_adjoint(self, way, optimizer):
        """Exactly, where the Hessian is constant; far from convergence, so that it is far from zero."""
        numpy = framework("numpy")
        case = quadratic(numpy, away=1.0)
        solver = bl.Unrolled(steps=5, **{**OPTIMIZERS[optimizer], "step_size": 0.02}, **WAYS[way])
        hg = case.hypergradient(solver)
        residual = np.linalg.norm(hg.params - case.target - case.matrix @ hg.adjoint)
        assert hg.info.residual_norm == pytest.approx(residual, rel=1e-12)
        assert hg.info.rhs_norm == pytest.approx(np.linalg.norm(hg.params - case.target), rel=1e-12)
        assert residual > 0.1 * hg.info.rhs_norm
