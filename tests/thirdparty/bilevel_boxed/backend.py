"""Derivatives by complex steps: objectives bring their gradients, the second derivatives are taken of them.

For a function that is analytic, Im f(x + ihv) / h = f'(x) v up to h², and there is no difference to lose digits in
(Squire & Trapp, SIAM Review 1998).
"""

from typing import Any

import boxed
import numpy as np
from typing_extensions import override

from bilevel.protocols import Backend, InnerDerivatives, OuterDerivatives
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.validation import check_scalar
from bilevel_boxed.space import BoxedSpace, cast

STEP = 1e-12  # its square vanishes against one in float32, too


class BoxedBackend(Backend):
    name = "boxed"
    space = BoxedSpace()

    @override
    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, boxed.Array)

    @override
    def leaves(self, tree: Any) -> Any:
        return list(leaves_with_paths(tree))

    @override
    def is_floating(self, leaf: Any) -> bool:
        return np.issubdtype(leaf.dtype, np.floating)

    @override
    def device(self, leaf: Any) -> None:
        return None

    @override
    def devices(self) -> list[str]:
        return ["a box"]

    @override
    def to_host(self, scalar: Any) -> Any:
        return scalar.item()

    @override
    def from_numpy(self, array: Any) -> Any:
        return boxed.Array(array)

    @override
    def to_numpy(self, array: Any) -> Any:
        return array.data

    @override
    def inner(self, objective: Any, params: Any, hparams: Any, args: Any) -> InnerDerivatives:
        grad = objective.grad
        # A nan in λ reaches ∂L/∂w wherever λ does, also where it is multiplied by zero.
        poisoned = grad(params, self.space.scale(float("nan"), hparams), *args)
        influences = not self.space.isfinite(poisoned)

        def hvp(v: Any) -> Any:
            return self._derivative(lambda w: grad(w, hparams, *args), params, v)

        def cross_vjp(v: Any) -> Any:
            if not influences:
                return None
            flat = self.space.ravel(hparams)
            rows = [
                self.space.dot(self._derivative(lambda h: grad(params, h, *args), hparams, unit), v)
                for unit in (self.space.unravel(boxed.Array(e), hparams) for e in np.eye(flat.size, dtype=flat.dtype))
            ]
            return self.space.unravel(np.stack(rows), hparams)

        return InnerDerivatives(grad(params, hparams, *args), hvp, cross_vjp)

    def _derivative(self, function: Any, x: Any, v: Any) -> Any:
        """Return the derivative of a function of x along v, of any size."""
        size = self.space.max_abs(v).item() or 1.0
        slope = function(tree_map(lambda a, b: a + (1j * STEP / size) * b, x, v))
        return tree_map(lambda a, like: cast(np.imag(a) * (size / STEP), like.dtype), slope, function(x))

    @override
    def outer(self, objective: Any, params: Any, hparams: Any, args: Any, role: str = "outer") -> OuterDerivatives:
        value = objective(params, hparams, *args)
        check_scalar(role, value)
        return OuterDerivatives(value, *objective.grad(params, hparams, *args))

    @override
    def execute(self, function: Any, solver: Any, problem: Any, point: Any) -> Any:
        with np.errstate(all="ignore"):  # solvers look at the numbers themselves
            return function(self, solver, problem, point)
