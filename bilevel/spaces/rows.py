"""Several vectors as one tree, whose leaves have a leading axis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from bilevel.spaces.array import Array, V
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class Rows(Generic[V]):
    """The trees with a leading axis whose rows are vectors of one space.

    Attributes:
        space: the space of a row, inside of ``batched``.
        whole: the space of all rows as one vector, outside of ``batched``.
        batched: applies a function of trees to each row of its arguments, and returns the rows of its results.
    """

    space: Space[V]
    whole: Space[Any]
    batched: Callable[..., Any]

    def norms(self, x: Any) -> Array:
        """Return the Euclidean norm of each row."""
        return self.batched(self.space.norm, x)

    def scale(self, factors: Array, x: Any) -> Any:
        """Return each row times its factor."""
        return self.batched(self.space.scale, factors, x)

    def where(self, flags: Array, x: Any, y: Any) -> Any:
        """Return the rows of x where their flag holds, and the rows of y elsewhere."""
        return self.batched(self.space.where, flags, x, y)

    def minus(self, x: Any, matrix: Array, y: Any) -> Any:
        """Return x - matrix y."""
        return self.whole.subtract(x, self.whole.combine(matrix, y))

    def first(self, x: Any) -> V:
        """Return the first row."""
        return self.space.map(lambda a: a[0], x)
