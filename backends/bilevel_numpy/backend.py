"""Derivatives that the problem itself brings, checked."""

from collections.abc import Callable
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.problem import Problem
from bilevel.protocols import Backend, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.tree import leaves_with_paths
from bilevel.validation import check_like, check_scalar
from bilevel_numpy.space import NumpySpace


class NumpyBackend(Backend):
    """NumPy arrays and objects with analytic ``grad``, ``hvp`` and ``cross_vjp``."""

    name = "numpy"
    space = NumpySpace()

    @override
    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray | np.generic)

    @override
    def leaves(self, tree: Any) -> list[tuple[str, Any]]:
        return list(leaves_with_paths(tree))

    @override
    def is_floating(self, leaf: Any) -> bool:
        return np.issubdtype(leaf.dtype, np.floating)

    @override
    def device(self, leaf: Any) -> str | None:
        return None

    @override
    def devices(self) -> list[str]:
        return ["cpu"]

    @override
    def to_host(self, scalar: Any) -> Any:
        return scalar.item()

    @override
    def from_numpy(self, array: Any) -> Any:
        return np.asarray(array)

    @override
    def to_numpy(self, array: Any) -> Any:
        return np.asarray(array)

    @override
    def inner(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        objective: Any = problem.inner
        for method in ("grad", "hvp", "cross_vjp"):
            _require(objective, "inner", method)

        def hvp(v: Any) -> Any:
            product = objective.hvp(params, hparams, v, *args)
            check_like(self, "the inner hvp", product, "params", params)
            return product

        def cross_vjp(v: Any) -> Any:
            product = objective.cross_vjp(params, hparams, v, *args)
            if product is not None:
                check_like(self, "the inner cross_vjp", product, "hparams", hparams)
            return product

        def cross_jvp(u: Any) -> Any:
            if not hasattr(objective, "cross_jvp"):
                raise TypeError(
                    f"the inner objective ({type(objective).__name__}) has no method 'cross_jvp', which forward mode "
                    "needs on the numpy backend: cross_jvp(params, hparams, vector, *args) returns (∂²L/∂λ∂w) vector "
                    'for a vector like hparams (see bilevel.problems). mode="reverse" does without.'
                )
            product = objective.cross_jvp(params, hparams, u, *args)
            check_like(self, "the inner cross_jvp", product, "params", params)
            return product

        grad = objective.grad(params, hparams, *args)
        check_like(self, "the inner grad", grad, "params", params)
        return InnerDerivatives(grad, hvp, cross_vjp, cross_jvp)

    @override
    def outer(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> OuterDerivatives:
        objective: Any = problem.outer
        _require(objective, "outer", "grad")
        value = np.asarray(objective(params, hparams, *args))
        check_scalar("outer", value)
        grads = objective.grad(params, hparams, *args)
        if not isinstance(grads, tuple) or len(grads) != 2:
            raise TypeError("the outer grad: expected the pair (∂F/∂w, ∂F/∂λ), the second None for zero.")
        check_like(self, "the outer grad[0]", grads[0], "params", params)
        if grads[1] is not None:
            check_like(self, "the outer grad[1]", grads[1], "hparams", hparams)
        return OuterDerivatives(value[()], *grads)

    @override
    def execute(self, function: Callable[..., Any], solver: Solver | None, problem: Problem, point: Point) -> Any:
        # What is not finite gets a status, and on some processors BLAS sets the flag for finite numbers, too:
        # https://github.com/numpy/numpy/issues/24067
        with np.errstate(all="ignore"):
            return function(self, solver, problem, point)


def _require(objective: Any, role: str, method: str) -> None:
    if not hasattr(objective, method):
        raise TypeError(
            f"the {role} objective ({getattr(objective, '__name__', type(objective).__name__)}) has no method "
            f"{method!r}. The numpy backend needs analytic derivatives: grad, hvp and cross_vjp of inner, grad of "
            "outer (see bilevel.problems). The torch and jax backends derive them: pass torch or JAX arrays."
        )
