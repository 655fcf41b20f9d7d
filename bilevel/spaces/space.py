"""Trees of arrays as vectors, and loops: all that a solver sees of a framework."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np

from bilevel.spaces import loops, tree
from bilevel.spaces.array import Array, Number, V

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each leaf, by its path."""
State = TypeVar("State")
X = TypeVar("X")
Y = TypeVar("Y")


def kind_of(leaf: object) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a leaf. A leaf that is no array has the name of its class in place of a dtype."""
    return tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__))


class Space(Generic[V]):
    """The vectors that have the structure, shapes and dtypes of one tree of arrays.

    Scalars are arrays of shape () on the device of the data. A multiple of a vector keeps the dtypes of the vector.
    Dots accumulate in at least float32. A vector is opaque to a solver, and so is a stack of vectors.

    A backend subclasses this. It must write `dot`, `normal`, `ravel` and `unravel`. The other operations have a
    definition here, which a backend replaces where its framework does better.

    Args:
        like: a tree of arrays.
    """

    xp: Any = np
    """The framework's array namespace, for functions of scalars: ``where``, ``sqrt``, ``isfinite``."""

    def __init__(self, like: V) -> None:
        self.like = like

    # The tree.

    def leaves(self, x: object) -> list[Any]:
        """Return the arrays of a tree, in order."""
        return tree.leaves(x)

    def map(self, function: Callable[..., Any], x: X, *rest: object) -> X:
        """Apply an entrywise function to the leaves of trees of one structure. Keep the dtypes of the first."""
        return tree.tree_map(lambda a, *others: self.cast(function(a, *others), a), x, *rest)

    def layout(self, x: object) -> Layout:
        """Return shape and dtype of each leaf, by its path."""
        return {path: kind_of(leaf) for path, leaf in tree.leaves_with_paths(x)}

    def cast(self, value: Any, like: Any) -> Any:
        """Return an array or number in the dtype of an array."""
        return self.xp.asarray(value, dtype=like.dtype)

    @cached_property
    def eps(self) -> float:
        """The machine epsilon of the coarsest dtype."""
        return max(float(self.xp.finfo(a.dtype).eps) for a in self.leaves(self.like))

    @cached_property
    def size(self) -> int:
        """The number of entries."""
        return sum(prod(a.shape) for a in self.leaves(self.like))

    # Vectors.

    @abstractmethod
    def dot(self, x: V, y: V) -> Array:
        """Return the sum of the products of entries."""
        raise NotImplementedError

    @abstractmethod
    def normal(self, seed: int, count: int | None = None) -> Any:
        """Draw independent standard normal entries, the same for the same seed; of a stack if ``count`` is given."""
        raise NotImplementedError

    @abstractmethod
    def ravel(self, x: object) -> Any:
        """Return the entries of a tree as one array of shape (n,)."""
        raise NotImplementedError

    @abstractmethod
    def unravel(self, array: Any) -> V:
        """Return the vector whose entries are those of an array of shape (n,)."""
        raise NotImplementedError

    def norm(self, x: V) -> Array:
        """Return the Euclidean norm."""
        return self.xp.sqrt(self.dot(x, x))

    def zeros(self) -> V:
        """Return the zero vector."""
        return self.map(self.xp.zeros_like, self.like)

    def scale(self, alpha: Number, x: V) -> V:
        """Return alpha x."""
        return self.map(lambda a: a * self.cast(alpha, a), x)

    def axpy(self, alpha: Number, x: V, y: V) -> V:
        """Return alpha x + y."""
        return self.map(lambda b, a: a * self.cast(alpha, b) + b, y, x)

    def copy(self, x: V) -> V:
        """Return a vector in new memory, for `axpby_where` to use up, or for callers to write to."""
        return self.scale(1.0, x)

    def subtract(self, x: V, y: V) -> V:
        """Return x - y."""
        return self.axpy(-1.0, y, x)

    def where(self, flag: Array, x: X, y: X) -> X:
        """Return x where the scalar flag holds, else y. A nan in the other one does no harm."""
        return self.map(lambda a, b: self.xp.where(flag, a, b), x, y)

    def axpby_where(self, flag: Array, alpha: Number, x: V, y: V, beta: Number = 1.0) -> V:
        """Return alpha x + beta y where the flag holds, else y. The memory may be that of y, which is used up."""
        scaled = y if isinstance(beta, float) and beta == 1.0 else self.scale(beta, y)
        return self.where(flag, self.axpy(alpha, x, scaled), y)

    def max_abs(self, x: V) -> Array:
        """Return the largest absolute entry in the dtype of a dot; nan if there is one, 0 if there is no entry."""
        parts = [self.xp.max(self.xp.abs(a)) for a in self.leaves(x) if prod(a.shape)]
        none = self.xp.zeros_like(self.dot(x, x)) if not parts else self.dot(x, x)
        return self.xp.max(self.xp.stack([self.cast(part, none) for part in parts])) if parts else none

    def isfinite(self, x: object) -> Array:
        """Tell whether no entry is nan or infinite."""
        return self.xp.all(self.xp.stack([self.xp.all(self.xp.isfinite(a)) for a in self.leaves(x)]))

    # Stacks: several vectors. Here a list of them.

    def stack(self, count: int) -> Any:
        """Return room for ``count`` vectors, all zero."""
        return [self.zeros() for _ in range(count)]

    def set(self, stack: Any, i: Any, x: V) -> Any:
        """Return the stack with x in place i. The memory may be that of the old stack, which is used up."""
        return [x if k == int(i) else old for k, old in enumerate(stack)]

    def get(self, stack: Any, i: Any) -> V:
        """Return vector i of a stack."""
        return stack[int(i)]

    def stack_dot(self, stack: Any, x: V) -> Array:
        """Return the dots of x with each vector of a stack, as one array."""
        return self.xp.stack([self.dot(y, x) for y in stack])

    def linear_combination(self, coefficients: Array, stack: Any) -> V:
        """Return the sum of coefficients[i] times vector i."""
        total = self.zeros()
        for k, x in enumerate(stack):
            total = self.axpy(coefficients[k], x, total)
        return total

    # Loops: here those of Python.

    def while_loop(
        self, live: Callable[[State], Array], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        """Repeat body while live(state), at most max_steps times.

        The flag may be read only every few steps, which spares an accelerator the synchronisation. So a body must leave
        the state unchanged once live(state) is false.
        """
        return loops.while_loop(live, body, state, max_steps)

    def scan(
        self,
        body: Callable[[State, Any], tuple[State, Any]],
        state: State,
        xs: Any | None,
        length: int,
        reverse: bool = False,
    ) -> tuple[State, Any]:
        """Thread a state through ``length`` steps. Collect the values that the steps yield, for a later scan's xs."""
        return loops.scan(body, state, xs, length, reverse)

    def cond(self, flag: Array, body: Callable[[State], State], state: State) -> State:
        """Return body(state) where the flag holds, else the state."""
        return body(state) if flag else state

    def sequence(self, items: Sequence[X]) -> Callable[[Any], X]:
        """Return i -> items[i modulo their number], for an i that a loop counts. Items are any trees."""
        return lambda i: items[int(i) % len(items)]

    # The host.

    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: Any) -> Any:
        """Call a function of float64 NumPy arrays. Return its result in the dtype and place of the last argument."""
        return self.cast(function(*(np.asarray(a, np.float64) for a in arrays)), arrays[-1])

    def materialise(self, operator: Callable[[V], V]) -> Any:
        """Return the matrix of a linear operator, of shape (n, n), from n products."""
        rows = self.xp.eye(self.size, dtype=self.ravel(self.like).dtype)
        columns = [self.ravel(operator(self.unravel(row))) for row in rows]
        return self.xp.stack(columns).T
