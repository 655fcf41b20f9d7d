"""A function of the user as a preconditioner."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import isroutine
from typing import Any

from bilevel.operators.linear_operator import LinearOperator
from bilevel.preconditioners.preconditioner import check_preconditioner
from bilevel.spaces.array import Number, V
from bilevel.spaces.layout import check_layout
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class FunctionPreconditioner:
    """Multiply by an approximate inverse that a function knows, for example from another solver.

    Args:
        function: v -> M v for trees like params. For `CG` and `Neumann`, M is symmetric and positive definite.
    """

    function: Callable[[Any], Any]

    def init(self, A: LinearOperator[V]) -> None:
        """Return None, because there is no state."""

    def apply(self, state: None, vector: V, damping: Number, space: Space[V]) -> V:
        """Return M v. Raise a ValueError if it has another layout than params."""
        product = self.function(vector)
        check_layout("preconditioner(v)", product, "params", space)
        return product


def set_preconditioner(solver: Any) -> None:
    """Convert the option ``preconditioner`` of a solver if it is a function. Raise a TypeError for other values."""
    if isroutine(solver.preconditioner):
        object.__setattr__(solver, "preconditioner", FunctionPreconditioner(solver.preconditioner))
    check_preconditioner(solver.preconditioner, solver.name)
