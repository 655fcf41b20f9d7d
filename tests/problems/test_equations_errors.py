"""Mistakes in fixed points and roots, and what the errors say."""

import numpy as np
import pytest
from cases import KINDS, Affine, SquaredDistance, equation
from frameworks import framework, relative_error

import bilevel as bl
from bilevel import scipy_fit


class TestMistakes:
    @pytest.fixture(params=["torch", "jax"])
    def autodiff(self, request):
        return framework(request.param)

    def one(self, backend, dtype=np.float64):
        return backend.from_numpy(np.ones(2, dtype))

    def call(self, backend, step, solver="exact", kind=bl.FixedPoint):
        return bl.hypergradient(
            kind(step, lambda w, h: (w**2).sum()), self.one(backend), self.one(backend), solver=solver
        )

    def test_what_cannot_be_called(self):
        with pytest.raises(
            TypeError, match=r"FixedPoint\.step: expected a function .* returns the next params, got int"
        ):
            bl.FixedPoint(3, SquaredDistance())
        with pytest.raises(TypeError, match=r"Root\.outer: expected a function .* returns a scalar, got str"):
            bl.Root(Affine(), "outer")

    def test_a_step_of_another_structure(self, autodiff):
        with pytest.raises(ValueError, match=r"step: expected the structure of params.*\(2,\).*\(\)"):
            self.call(autodiff, lambda w, h: (w * h).sum())
        with pytest.raises(ValueError, match=r"residual: expected the structure of params.*residual is no array"):
            self.call(autodiff, lambda w, h: (w * h, w), kind=bl.Root)

    def test_a_step_of_another_dtype(self, autodiff):
        def step(w, h):
            half = w * h
            return half.float() if hasattr(half, "float") else half.astype("float32")

        with pytest.raises(TypeError, match=r"step is .*float32, but params .*float64: convert one"):
            self.call(autodiff, step)

    @pytest.mark.parametrize("kind", [bl.FixedPoint, bl.Root])
    def test_a_step_without_params(self, autodiff, kind):
        role = "step" if kind is bl.FixedPoint else "residual"
        for solver in ("exact", "identity"):
            with pytest.raises(ValueError, match=f"{role} does not depend on params. Use the params argument"):
                self.call(autodiff, lambda w, h: 2 * h, solver, kind)

    @pytest.mark.parametrize("kind", [bl.FixedPoint, bl.Root])
    def test_a_step_without_hparams(self, autodiff, kind):
        with pytest.raises(ValueError, match=r"depends on hparams\. Use the hparams argument"):
            self.call(autodiff, lambda w, h: 0.5 * w, kind=kind)

    def test_leaves_without_influence_get_zeros(self, autodiff):
        params = {"a": self.one(autodiff), "b": self.one(autodiff)}
        problem = bl.FixedPoint(
            lambda w, h: {"a": 0.5 * w["a"] + h["a"], "b": h["a"]}, lambda w, h: (w["a"] ** 2).sum()
        )
        hparams = {"a": 0.5 * self.one(autodiff), "b": self.one(autodiff)}
        with pytest.warns(bl.DependenceWarning, match=r"depends on hparams\['b'\]"):
            hg = bl.hypergradient(problem, params, hparams, solver="exact")
        assert relative_error(hg.grad["a"], [4.0, 4.0]) <= 1e-12
        assert autodiff.to_numpy(hg.grad["b"]).tolist() == [0.0, 0.0]

    def test_numpy_methods_that_are_missing(self):
        class Half:
            def __call__(self, w, h):
                return 0.5 * w

        case = equation("fixed point", bl.get_backend("numpy"))
        with pytest.raises(TypeError, match=r"the step \(Half\) has no method 'vjp_params'.*torch and jax"):
            bl.hypergradient(bl.FixedPoint(Half(), SquaredDistance()), case.params, case.hparams, **case.args)

    def test_a_backend_without_them(self):
        from bilevel.backend import Backend

        case, backend = equation("root", bl.get_backend("numpy")), bl.get_backend("numpy")

        class Bare(type(backend)):
            jacobian, gauss_newton = Backend.jacobian, Backend.gauss_newton

        with pytest.raises(TypeError, match="residual: the numpy backend has no derivatives of fixed points and roots"):
            case.hypergradient(solver="exact", backend=Bare())

    def test_what_is_no_problem(self):
        with pytest.raises(TypeError, match=r"problem: expected bl\.Problem.*bl\.FixedPoint or bl\.Root, got Affine"):
            bl.hypergradient(Affine(), np.ones(2), np.ones(2))

    def test_scipy_fit_has_nothing_to_minimize(self):
        with pytest.raises(TypeError, match="scipy_fit minimizes an inner objective, which FixedPoint does not have"):
            scipy_fit(KINDS["fixed point"](Affine(), SquaredDistance()))
