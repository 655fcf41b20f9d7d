"""A function of the user as a preconditioner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Number, V
from bilevel.spaces.layout import check_layout
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class FunctionPreconditioner:
    """Multiply by an approximate inverse that a function knows, for example from another solver.

    Args:
        function: v -> M v for trees like params, with M symmetric and positive definite.
    """

    function: Callable[[Any], Any]

    def init(self, A: LinearOperator[V]) -> None:
        """Return None, because there is no state."""

    def apply(self, state: None, vector: V, damping: Number, space: Space[V]) -> V:
        """Return M v. Raise a ValueError if it has another layout than params."""
        product = self.function(vector)
        check_layout("preconditioner(v)", product, "params", space)
        return product
