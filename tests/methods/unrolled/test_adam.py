"""Adam's steps near zero gradients and in float32."""

import numpy as np
import pytest
from frameworks import DTYPES, relative_error, tolerance
from unrolled_cases import WAYS, Quartic, SquaredNorm

import bilevel as bl


class Tiny:
    """L = ½ scale ‖w − λ‖²."""

    def __call__(self, w, h, scale):
        return scale * ((w - h) ** 2).sum() / 2

    def grad(self, w, h, scale):
        return scale * (w - h)

    def hvp(self, w, h, v, scale):
        return scale * v

    def cross_vjp(self, w, h, v, scale):
        return -scale * v

    cross_jvp = cross_vjp


TINY = bl.Problem(Tiny(), SquaredNorm())


class TestAdam:
    def test_auto_is_a_thousandth(self, backend):
        case = Quartic()
        auto, explicit = (case.hypergradient(backend, None, optimizer="adam", **o) for o in ({}, {"step_size": 1e-3}))
        assert (backend.to_numpy(auto.grad) == backend.to_numpy(explicit.grad)).all()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_gradients_have_the_true_derivative(self, backend, way, dtype):
        """One entry starts at its minimum, where dw_1/dλ = α/eps; the other has no gradient at all."""

        class Inner:
            def __call__(self, w, h):
                return ((w - h) ** 2 * mask).sum() / 2

            def grad(self, w, h):
                return mask * (w - h)

            def hvp(self, w, h, v):
                return mask * v

            def cross_vjp(self, w, h, v):
                return -mask * v

            cross_jvp = cross_vjp

        mask = backend.from_numpy(np.array([1.0, 0.0], dtype))
        problem = bl.problems.quadratic(
            *(backend.from_numpy(a.astype(dtype)) for a in (np.eye(2), np.eye(2), np.ones(2)))
        )
        w, h = (backend.from_numpy(np.array([3.0, 5.0], dtype)) for _ in range(2))
        solver = bl.Unrolled(steps=1, optimizer="adam", step_size=0.25, eps=0.125, **WAYS[way])
        hg = bl.hypergradient(bl.Problem(Inner(), problem.outer), w, h, solver=solver)
        assert backend.to_numpy(hg.params).tolist() == [3.0, 5.0]
        assert backend.to_numpy(hg.grad) == pytest.approx([(3 - 1) * 0.25 / 0.125, 0.0], rel=tolerance(dtype))

    @pytest.mark.parametrize("way", WAYS)
    def test_tiny_gradients_do_not_overflow(self, backend, way):
        """Squares of which underflow in float32."""
        w, h = (backend.from_numpy(np.array(a, np.float32)) for a in ([3.0, 5.0], [1.0, 2.0]))
        for scale in (1e-12, 1e-18, 1e-22, 1e-30):
            args = (backend.from_numpy(np.array(scale, np.float32)),)
            solver = bl.Unrolled(steps=3, optimizer="adam", **WAYS[way])
            hg = bl.hypergradient(TINY, w, h, inner_args=args, solver=solver, on_failure="ignore")
            assert np.isfinite(backend.to_numpy(hg.grad)).all()
            # w moves by α ∂L/∂w / (|∂L/∂w| + eps), eps = 1e-8, which is linear in a gradient as small as this
            if scale <= 1e-18:
                assert backend.to_numpy(hg.grad) == pytest.approx(
                    np.array([3.0, 5.0]) * 3e-3 * scale / 1e-8, rel=1e-2, abs=0
                )

    def test_float32_keeps_the_bias_correction(self, backend):
        """1 − 0.999 has lost four digits in float32; from there on the error of the step must not grow."""
        case, options = Quartic(dtype=np.float32), {"optimizer": "adam", "step_size": 0.05, "steps": 3}
        hg = case.hypergradient(backend, None, **options)
        params, _, _ = case.by_hand(None, **options, beta1=0.9, beta2=0.999, eps=1e-8)
        assert relative_error(backend.to_numpy(hg.params), params) <= 1e-6
