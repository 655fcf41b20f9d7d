"""The protocol of preconditioners."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Number, V
from bilevel.spaces.space import Space

S = TypeVar("S")


@runtime_checkable
class Preconditioner(Protocol, Generic[S]):
    """A symmetric positive definite approximation of (A + damping I)⁻¹, up to a factor, as a frozen dataclass."""

    def init(self, A: LinearOperator[V]) -> S:
        """Return the state that needs products with A, such as a sketch or a diagonal. A is without the damping."""
        ...

    def apply(self, state: S, vector: V, damping: Number, space: Space[V]) -> V:
        """Return the approximation times a vector. ``state`` is the result of `init`."""
        ...


def init(M: Preconditioner[Any] | None, A: LinearOperator[V]) -> Any:
    """Return the state of a preconditioner, or None."""
    return None if M is None else M.init(A)


def applied(M: Preconditioner[Any] | None, state: Any, damping: Number, space: Space[V]) -> Callable[[V], V]:
    """Return v -> M v. Without a preconditioner, return v -> v."""
    return (lambda v: v) if M is None else lambda v: M.apply(state, v, damping, space)


def check_preconditioner(value: object, solver: str) -> None:
    """Raise a TypeError unless a value is None or an object with the methods of `Preconditioner`."""
    if value is not None and (isinstance(value, type) or not isinstance(value, Preconditioner)):
        hint = " Call the class." if isinstance(value, type) and issubclass(value, Preconditioner) else ""
        raise TypeError(
            f"{solver}.preconditioner: expected a function v -> M v, or an object with methods init() and apply(), "
            f"such as bl.DiagonalPreconditioner() or bl.NystromPreconditioner(), got {value!r}.{hint} Names are for "
            f'bl.get_solver: {{"name": "{solver.lower()}", "preconditioner": "nystrom"}}.'
        )
