"""Trees of NumPy arrays as vectors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.space import Space, State
from bilevel.spaces.tree import leaves_with_paths, tree_map


class NumpySpace(Space[V]):
    """See `bilevel.spaces.space.Space`. Loops do not warn about overflow, because solvers check for it."""

    @override
    def leaves(self, x: object) -> list[np.ndarray]:
        """Return the leaves as arrays. Python floats and NumPy scalars become arrays of shape ()."""
        return [np.asarray(leaf) for _, leaf in leaves_with_paths(x)]

    @override
    def map(self, function: Callable[..., Any], x: Any, *rest: object) -> Any:
        return tree_map(lambda a, *others: self.cast(function(np.asarray(a), *others), np.asarray(a)), x, *rest)

    @override
    def dot(self, x: V, y: V) -> Any:
        with np.errstate(all="ignore"):
            return sum(_dot(a, b) for a, b in zip(self.leaves(x), self.leaves(y), strict=True))

    @override
    def normal(self, seed: int, count: int | None = None) -> Any:
        rng, rows = np.random.default_rng(seed), () if count is None else (count,)
        return tree_map(lambda a: rng.standard_normal((*rows, *np.shape(a))).astype(np.asarray(a).dtype), self.like)

    @override
    def where(self, flag: Array, x: Any, y: Any) -> Any:
        return x if flag else y

    @override
    def axpby_where(self, flag: Array, alpha: Number, x: V, y: V, beta: Number = 1.0) -> V:
        return super().axpby_where(flag, alpha, x, y, beta) if flag else y

    @override
    def ravel(self, x: object) -> np.ndarray:
        return np.concatenate([leaf.ravel() for leaf in self.leaves(x)])

    @override
    def unravel(self, array: np.ndarray) -> V:
        parts = iter(np.split(array, np.cumsum([leaf.size for leaf in self.leaves(self.like)])[:-1]))
        return tree_map(lambda a: next(parts).reshape(np.shape(a)).astype(np.asarray(a).dtype), self.like)

    @override
    def stack(self, count: int) -> Any:
        return tree_map(lambda a: np.zeros((count, *np.shape(a)), np.asarray(a).dtype), self.like)

    @override
    def set(self, stack: Any, i: int, x: V) -> Any:
        def put(s: np.ndarray, a: np.ndarray) -> np.ndarray:
            s[i] = a
            return s

        return tree_map(put, stack, x)

    @override
    def get(self, stack: Any, i: int) -> V:
        return tree_map(lambda s: s[i].copy(), stack)

    @override
    def stack_dot(self, stack: object, x: V) -> Any:
        pairs = zip(self.leaves(stack), self.leaves(x), strict=True)
        return np.add.reduce([_rows_dot(s.reshape(len(s), a.size), a) for s, a in pairs])

    @override
    def linear_combination(self, coefficients: Any, stack: Any) -> V:
        return tree_map(lambda s: np.tensordot(self.cast(coefficients, s), s, 1), stack)

    @override
    def gram(self, rows: Any, others: Any) -> Any:
        parts = []
        for a, b in zip(self.leaves(rows), self.leaves(others), strict=True):
            dtype, shape = np.result_type(a.dtype, b.dtype, np.float32), (len(a), a[0].size)
            parts.append(a.reshape(shape).astype(dtype, copy=False) @ b.reshape(shape).astype(dtype, copy=False).T)
        return np.add.reduce(parts)

    @override
    def while_loop(
        self, live: Callable[[State], Array], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        with np.errstate(all="ignore"):
            return super().while_loop(live, body, state, max_steps)

    @override
    def scan(self, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return super().scan(*args, **options)


def _dot(a: np.ndarray, b: np.ndarray) -> Any:
    """Return the dot product of two arrays, summed in at least float32."""
    return _rows_dot(a.reshape(1, a.size), b)[0]


def _rows_dot(rows: np.ndarray, a: np.ndarray) -> Any:
    """Return the dot product of an array with each row of a matrix."""
    dtype = np.result_type(rows.dtype, a.dtype, np.float32)
    return np.dot(rows.astype(dtype, copy=False), a.ravel().astype(dtype, copy=False))
