"""Derivatives by complex steps: objectives bring their gradients, the second derivatives are taken of them.

For a function that is analytic, Im f(x + ihv) / h = f'(x) v up to h², and there is no difference to lose digits in
(Squire & Trapp, SIAM Review 1998).
"""

from typing import Any

import boxed
import numpy as np

from bilevel.backend import Backend
from bilevel.linearization import LinearizedMap, OuterDerivatives
from bilevel.spaces.tree import tree_map
from bilevel.validation import check_scalar
from bilevel_boxed.space import BoxedSpace

STEP = 1e-12  # its square vanishes against one in float32, too


class BoxedBackend(Backend):
    name = "boxed"

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, boxed.Array)

    def space(self, tree: Any) -> BoxedSpace:
        return BoxedSpace(tree)

    def is_floating(self, leaf: Any) -> bool:
        return np.issubdtype(leaf.dtype, np.floating)

    def devices(self) -> list[str]:
        return ["a box"]

    def from_numpy(self, array: Any) -> Any:
        return boxed.Array(array)

    def to_numpy(self, array: Any) -> Any:
        return array.data

    def inner(self, objective: Any, params: Any, hparams: Any, args: Any) -> LinearizedMap[Any, Any]:
        of_params, of_hparams = self.space(params), self.space(hparams)
        # A nan in λ reaches ∂L/∂w wherever λ does, also where it is multiplied by zero.
        influences = not of_params.isfinite(objective.grad(params, of_hparams.scale(float("nan"), hparams), *args))

        def along(v: Any, u: Any) -> Any:
            """Return the derivative of ∂L/∂w along a direction of any size."""
            size = max(of_params.max_abs(v).item(), of_hparams.max_abs(u).item()) or 1.0
            moved = tree_map(lambda a, b: a + (1j * STEP / size) * b, (params, hparams), (v, u))
            return of_params.map(lambda _, a: np.imag(a) * (size / STEP), params, objective.grad(*moved, *args))

        def jvp_hparams(u: Any) -> Any:
            return along(of_params.zeros(), u)

        def vjp_hparams(v: Any) -> Any:
            if not influences:
                return None
            units = map(of_hparams.unravel, np.eye(of_hparams.size))
            return of_hparams.unravel(np.stack([of_params.dot(jvp_hparams(e), v) for e in units]))

        residual = objective.grad(params, hparams, *args)
        return LinearizedMap(residual, lambda v: along(v, of_hparams.zeros()), vjp_hparams, jvp_hparams)

    def outer(
        self, objective: Any, params: Any, hparams: Any, args: Any, *, label: str = "outer", data: Any = "outer"
    ) -> OuterDerivatives[Any, Any]:
        value = objective(params, hparams, *args)
        check_scalar(label, value)
        return OuterDerivatives(value, *objective.grad(params, hparams, *args))

    def run(self, function: Any, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):  # solvers look at the numbers themselves
            return function(self, *args, **options)
