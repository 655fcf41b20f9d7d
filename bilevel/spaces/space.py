"""Trees of arrays as vectors, and loops: the operations of a framework that solvers use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from math import prod
from operator import add
from typing import Any, Generic, TypeVar

import numpy as np

from bilevel.spaces import loops, tree
from bilevel.spaces.array import Array, Number, V

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each leaf, by its path."""
State = TypeVar("State")
X = TypeVar("X")


def kind_of(leaf: object) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a leaf. If the leaf is not an array, return its class name in place of the dtype."""
    return tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__))


class Space(Generic[V]):
    """The vectors that have the structure, shapes and dtypes of one tree of arrays.

    Scalars are arrays of shape () on the device of the data. A multiple of a vector keeps the dtypes of the vector.
    Dots accumulate in at least float32. Solvers handle vectors and stacks of vectors only through a space.

    A backend subclasses this class. It must define `dot`, `normal`, `ravel` and `unravel`. It may override the other
    operations with faster ones.

    Args:
        like: a tree of arrays.
    """

    xp: Any = np
    """The array namespace of scalars and of matrices of scalars: ``where``, ``sqrt``, ``isfinite`` and the like."""

    def __init__(self, like: V) -> None:
        self.like = like

    @property
    def leaf_xp(self) -> Any:
        """The array namespace of leaves."""
        return self.xp

    # The tree.

    def leaves(self, x: object) -> list[Any]:
        """Return the arrays of a tree, in order."""
        return tree.leaves(x)

    def map(self, function: Callable[..., Any], x: X, *rest: object) -> X:
        """Apply an entrywise function to the leaves of trees of one structure. Keep the dtypes of the first tree."""
        return tree.tree_map(lambda a, *others: self.cast(function(a, *others), a), x, *rest)

    def layout(self, x: object) -> Layout:
        """Return shape and dtype of each leaf, by its path."""
        return {path: kind_of(leaf) for path, leaf in tree.leaves_with_paths(x)}

    def cast(self, value: Any, like: Any) -> Any:
        """Return an array or number in the dtype of an array."""
        return self.leaf_xp.asarray(value, dtype=like.dtype)

    def leaf(self, scalar: Any) -> Any:
        """Return a scalar as an array that can be a leaf of a tree."""
        return scalar

    @cached_property
    def eps(self) -> float:
        """The machine epsilon of the coarsest dtype."""
        return max(float(self.leaf_xp.finfo(a.dtype).eps) for a in self.leaves(self.like))

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
        """Draw a vector, or a stack of ``count`` vectors, of standard normal entries that depend only on the seed."""
        raise NotImplementedError

    @abstractmethod
    def ravel(self, x: object) -> Any:
        """Return the entries of a tree as one array of shape (n,)."""
        raise NotImplementedError

    @abstractmethod
    def unravel(self, array: Any) -> V:
        """Return the vector with the entries of an array of shape (n,)."""
        raise NotImplementedError

    def norm(self, x: V) -> Array:
        """Return the Euclidean norm."""
        return self.xp.sqrt(self.dot(x, x))

    def zeros(self, shared: bool = False) -> V:
        """Return the zero vector. With ``shared``, its entries may share their memory, so do not write to it."""
        return self.map(self.leaf_xp.zeros_like, self.like)

    def scale(self, alpha: Number, x: V) -> V:
        """Return alpha x."""
        return self.map(lambda a: a * self.cast(alpha, a), x)

    def axpy(self, alpha: Number, x: V, y: V) -> V:
        """Return alpha x + y."""
        return self.map(lambda b, a: a * self.cast(alpha, b) + b, y, x)

    def copy(self, x: V) -> V:
        """Return the vector in new memory, which `axpby_where` and callers may overwrite."""
        return self.scale(1.0, x)

    def subtract(self, x: V, y: V) -> V:
        """Return x - y."""
        return self.axpy(-1.0, y, x)

    def where(self, flag: Array, x: X, y: X) -> X:
        """Return x where the scalar flag holds, else y. A nan in the other tree has no effect."""
        return self.map(lambda a, b: self.leaf_xp.where(flag, a, b), x, y)

    def axpby_where(self, flag: Array, alpha: Number, x: V, y: V, beta: Number = 1.0) -> V:
        """Return alpha x + beta y where the flag holds, else y. The result may overwrite the memory of y."""
        scaled = y if isinstance(beta, float) and beta == 1.0 else self.scale(beta, y)
        return self.where(flag, self.axpy(alpha, x, scaled), y)

    def max_abs(self, x: V) -> Array:
        """Return the largest absolute entry, in the dtype of a dot. It is nan if an entry is nan, 0 if x is empty."""
        parts = [self.xp.max(self.xp.abs(a)) for a in self.leaves(x) if prod(a.shape)]
        none = self.xp.zeros_like(self.dot(x, x)) if not parts else self.dot(x, x)
        return self.xp.max(self.xp.stack([self.cast(part, none) for part in parts])) if parts else none

    def isfinite(self, x: object) -> Array:
        """Tell whether no entry is nan or infinite."""
        return self.xp.all(self.xp.stack([self.xp.all(self.xp.isfinite(a)) for a in self.leaves(x)]))

    # A stack holds several vectors. In this class, it is a list.

    def stack(self, count: int) -> Any:
        """Return a stack of ``count`` zero vectors."""
        return [self.zeros() for _ in range(count)]

    def set(self, stack: Any, i: Any, x: V) -> Any:
        """Return the stack with x as vector i. The result may overwrite the memory of the old stack."""
        return [x if k == int(i) else old for k, old in enumerate(stack)]

    def get(self, stack: Any, i: Any) -> V:
        """Return vector i of a stack."""
        return stack[int(i)]

    def stack_dot(self, stack: Any, x: V) -> Array:
        """Return the dots of x with the vectors of a stack, as one array."""
        return self.xp.stack([self.dot(y, x) for y in stack])

    def linear_combination(self, coefficients: Array, stack: Any) -> V:
        """Return Σ coefficients[i] · vector i."""
        total = self.zeros()
        for k, x in enumerate(stack):
            total = self.axpy(coefficients[k], x, total)
        return total

    # Rows are vectors in one tree, whose leaves have a leading axis. This space is of all rows, or of one.

    def gram(self, rows: Any, others: Any) -> Array:
        """Return the matrix of the dots of rows with other rows."""
        pairs = zip(self.leaves(rows), self.leaves(others), strict=True)
        return reduce(add, [_matrix(a) @ _matrix(b).T for a, b in pairs])

    def combine(self, matrix: Array, rows: Any) -> Any:
        """Return Σ_j matrix[i, j] · row j as row i."""
        return self.map(lambda a: self.leaf_xp.tensordot(self.cast(matrix, a), a, 1), rows)

    # In this class, loops run in Python.

    def while_loop(
        self, live: Callable[[State], Array], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        """Repeat body while live(state), at most max_steps times.

        A backend may read the flag only every few steps, to avoid synchronisations with an accelerator. So the body
        must return the state unchanged once live(state) is false.
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
        """Pass a state through ``length`` steps. Collect their second results, which can be the xs of another scan."""
        return loops.scan(body, state, xs, length, reverse)

    def cond(self, flag: Array, body: Callable[[State], State], state: State) -> State:
        """Return body(state) where the flag holds, else the state."""
        return body(state) if flag else state

    def sequence(self, items: Sequence[X]) -> Callable[[Any], X]:
        """Return i -> items[i modulo their number], where i may be the counter of a loop. Items are trees."""
        return lambda i: items[int(i) % len(items)]

    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: Any) -> Any:
        """Call a function of float64 NumPy arrays. Return its result in the dtype and device of the last argument."""
        return self.cast(function(*(np.asarray(a, np.float64) for a in arrays)), arrays[-1])

    def materialise(self, operator: Callable[[V], V]) -> Any:
        """Return the matrix of a linear operator, of shape (n, n), from n products."""
        rows = self.leaf_xp.eye(self.size, dtype=self.ravel(self.like).dtype)
        columns = [self.ravel(operator(self.unravel(row))) for row in rows]
        return self.leaf_xp.stack(columns).T


def _matrix(rows: Any) -> Any:
    return rows.reshape(len(rows), prod(rows.shape[1:]))
