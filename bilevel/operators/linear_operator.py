"""A linear operator with its space and its properties."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

from bilevel.options import is_python_value
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class LinearOperator(Generic[V]):
    """v -> A v, from a space to itself.

    Attributes:
        space: the vectors.
        mv: v -> A v.
        symmetric: whether A is its own transpose. The operators of fixed points and roots are not.
        sample: i -> the product of step i, if each step uses another sample of A, such as the Hessian on a batch of
            data. Then ``mv`` is the product of the first sample. None: all products use the same A.
        slack: an error of a solution x is accepted if a change of A by this norm explains it.
        transpose: v -> Aᵀ v, for an A that is not symmetric. None: it is unknown.
        indefinite: whether A has eigenvalues of both signs at every solution, as the matrix of KKT conditions.
    """

    space: Space[V]
    mv: Callable[[V], V]
    symmetric: bool = True
    sample: Callable[[Array | int], Callable[[V], V]] | None = None
    slack: Number = 0.0
    transpose: Callable[[V], V] | None = None
    indefinite: bool = False

    def __call__(self, v: V) -> V:
        return self.mv(v)

    @property
    def steady(self) -> bool:
        """Whether A is symmetric and all products use the same A."""
        return self.symmetric and self.sample is None

    def at(self, i: Array | int) -> Callable[[V], V]:
        """Return the product of step i."""
        return self.mv if self.sample is None else self.sample(i)

    @property
    def mv_transposed(self) -> Callable[[V], V] | None:
        """v -> Aᵀ v. None: it is unknown."""
        return self.mv if self.symmetric else self.transpose

    def transposed(self) -> "LinearOperator[V]":
        """Return Aᵀ. Raise a TypeError if its products are unknown."""
        if self.symmetric:
            return self
        if self.transpose is None or self.sample is not None:
            raise TypeError("the products with the transposed operator are unknown.")
        return replace(self, mv=self.transpose, transpose=self.mv)

    def damped(self, damping: Number) -> "LinearOperator[V]":
        """Return A + damping I, with the same properties."""
        if is_python_value(damping) and damping == 0:
            return self
        space, sample, transpose = self.space, self.sample, self.transpose

        def shift(product: Callable[[V], V]) -> Callable[[V], V]:
            return lambda v: space.axpy(damping, v, product(v))

        return replace(
            self,
            mv=shift(self.mv),
            sample=None if sample is None else lambda i: shift(sample(i)),
            transpose=None if transpose is None else shift(transpose),
        )

    def with_slack(self, slack: Number) -> "LinearOperator[V]":
        """Return the same operator with another slack."""
        return replace(self, slack=slack)

    def tolerance(self, least: Array, x: V) -> Array:
        """Return the largest accepted norm(b - A x): slack · norm(x), or ``least`` if this is more."""
        if is_python_value(self.slack) and self.slack == 0:
            return least
        return self.space.xp.maximum(least, self.slack * self.space.norm(x))

    def residual(self, b: V, x: V) -> V:
        """Return b - A x, by one product."""
        return self.space.subtract(b, self.mv(x))
