"""Trees of NumPy arrays as vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bilevel.spaces import loops
from bilevel.spaces.tree import leaves_with_paths, tree_map


def leaves(tree: Any) -> list[np.ndarray]:
    """Return the leaves as arrays; Python floats and NumPy scalars become zero-dimensional ones."""
    return [np.asarray(leaf) for _, leaf in leaves_with_paths(tree)]


class NumpySpace:
    """See `bilevel.protocols.VectorSpace`. Overflow is the solvers' business, so loops do not warn of it."""

    xp = np

    def dot(self, x: Any, y: Any) -> Any:
        with np.errstate(all="ignore"):
            return sum(_dot(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))

    def axpy(self, alpha: Any, x: Any, y: Any) -> Any:
        return tree_map(lambda a, b: np.multiply(a, _cast(alpha, b)) + b, x, y)

    def scale(self, alpha: Any, x: Any) -> Any:
        return tree_map(lambda a: np.multiply(a, _cast(alpha, a)), x)

    def update(self, flag: Any, alpha: Any, x: Any, y: Any, beta: Any = None) -> Any:
        return self.axpy(alpha, x, y if beta is None else self.scale(beta, y)) if flag else y

    def zeros_like(self, x: Any) -> Any:
        return tree_map(np.zeros_like, x)

    def map(self, function: Callable, x: Any, *rest: Any) -> Any:
        return tree_map(lambda a, *others: _cast(function(np.asarray(a), *others), a), x, *rest)

    def select(self, flag: Any, x: Any, y: Any) -> Any:
        return x if flag else y

    def normal_like(self, x: Any, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return tree_map(lambda a: rng.standard_normal(np.shape(a)).astype(np.asarray(a).dtype), x)

    def max_abs(self, x: Any) -> Any:
        return np.max([np.max(np.abs(leaf), initial=0.0).astype(_accumulator(leaf, leaf)) for leaf in leaves(x)])

    def isfinite(self, x: Any) -> Any:
        return np.bool_(all(np.isfinite(leaf).all() for leaf in leaves(x)))

    def eps(self, x: Any) -> float:
        return max(float(np.finfo(leaf.dtype).eps) for leaf in leaves(x))

    def size(self, x: Any) -> int:
        return sum(leaf.size for leaf in leaves(x))

    def stack_like(self, x: Any, count: int) -> Any:
        return tree_map(lambda a: np.zeros((count, *np.shape(a)), np.asarray(a).dtype), x)

    def put(self, stack: Any, i: Any, x: Any) -> Any:
        def put(s: np.ndarray, a: np.ndarray) -> np.ndarray:
            s[i] = a
            return s

        return tree_map(put, stack, x)

    def take(self, stack: Any, i: Any) -> Any:
        return tree_map(lambda s: s[i].copy(), stack)

    def project(self, stack: Any, x: Any) -> Any:
        return np.add.reduce([_project(s, a) for s, a in zip(leaves(stack), leaves(x), strict=True)])

    def combine(self, coefficients: Any, stack: Any) -> Any:
        return tree_map(lambda s: np.tensordot(_cast(coefficients, s), s, 1), stack)

    def sequence(self, items: Sequence[Any]) -> Callable[[Any], Any]:
        return loops.sequence(items)

    def while_loop(self, live: Callable, body: Callable, state: Any, max_steps: int) -> Any:
        with np.errstate(all="ignore"):
            return loops.while_loop(live, body, state, max_steps)

    def scan(self, body: Callable, state: Any, xs: Any, length: int, reverse: bool = False) -> tuple[Any, Any]:
        with np.errstate(all="ignore"):
            return loops.scan(body, state, xs, length, reverse)

    def cond(self, flag: Any, body: Callable, state: Any) -> Any:
        return body(state) if flag else state

    def ravel(self, x: Any) -> np.ndarray:
        return np.concatenate([leaf.ravel() for leaf in leaves(x)])

    def unravel(self, array: Any, like: Any) -> Any:
        parts = iter(np.split(array, np.cumsum([leaf.size for leaf in leaves(like)])[:-1]))
        return tree_map(lambda a: next(parts).reshape(np.shape(a)).astype(np.asarray(a).dtype), like)

    def dense(self, operator: Callable, like: Any) -> np.ndarray:
        flat = self.ravel(like)
        basis = np.eye(flat.size, dtype=flat.dtype)
        return np.stack([self.ravel(operator(self.unravel(e, like))) for e in basis], axis=1)

    def on_host(self, function: Callable, *arrays: np.ndarray) -> np.ndarray:
        return function(*(a.astype(np.float64) for a in arrays)).astype(arrays[-1].dtype)


def _dot(a: np.ndarray, b: np.ndarray) -> Any:
    dtype = _accumulator(a, b)
    return np.dot(a.ravel().astype(dtype, copy=False), b.ravel().astype(dtype, copy=False))


def _project(s: np.ndarray, a: np.ndarray) -> Any:
    dtype = _accumulator(s, a)
    return s.reshape(len(s), a.size).astype(dtype, copy=False) @ a.ravel().astype(dtype, copy=False)


def _accumulator(a: np.ndarray, b: np.ndarray) -> np.dtype:
    return np.promote_types(np.promote_types(a.dtype, b.dtype), np.float32)


def _cast(alpha: Any, like: Any) -> Any:
    return np.asarray(alpha, dtype=np.asarray(like).dtype)
