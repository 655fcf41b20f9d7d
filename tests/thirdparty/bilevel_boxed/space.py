"""Trees of boxed arrays as vectors. NumPy's functions take boxed arrays, so that they are the namespace."""

from functools import reduce
from typing import Any

import boxed
import numpy as np

from bilevel.spaces import loops
from bilevel.spaces.tree import leaves_with_paths, tree_map


def leaves(tree: Any) -> list[Any]:
    return [leaf for _, leaf in leaves_with_paths(tree)]


def wide(*arrays: Any) -> Any:
    return np.result_type(np.float32, *(a.dtype for a in arrays))


def cast(a: Any, dtype: Any) -> Any:
    return boxed.Array(np.asarray(boxed.unbox(a), dtype))


class BoxedSpace:
    xp = np

    def dot(self, x: Any, y: Any) -> Any:
        return sum(np.sum(cast(a, wide(a, b)) * b) for a, b in zip(leaves(x), leaves(y), strict=True))

    def axpy(self, alpha: Any, x: Any, y: Any) -> Any:
        return tree_map(lambda a, b: a * cast(alpha, b.dtype) + b, x, y)

    def scale(self, alpha: Any, x: Any) -> Any:
        return tree_map(lambda a: a * cast(alpha, a.dtype), x)

    def update(self, flag: Any, alpha: Any, x: Any, y: Any, beta: Any = None) -> Any:
        return self.select(flag, self.axpy(alpha, x, y if beta is None else self.scale(beta, y)), y)

    def zeros_like(self, x: Any) -> Any:
        return tree_map(np.zeros_like, x)

    def map(self, function: Any, x: Any, *rest: Any) -> Any:
        return tree_map(lambda a, *others: cast(function(a, *others), a.dtype), x, *rest)

    def select(self, flag: Any, x: Any, y: Any) -> Any:
        return tree_map(lambda a, b: np.where(flag, a, b), x, y)

    def normal_like(self, x: Any, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return tree_map(lambda a: cast(rng.standard_normal(a.shape), a.dtype), x)

    def max_abs(self, x: Any) -> Any:
        return reduce(np.maximum, [cast(np.max(np.abs(a), initial=0.0), wide(a)) for a in leaves(x)])

    def isfinite(self, x: Any) -> Any:
        return reduce(np.logical_and, [np.all(np.isfinite(a)) for a in leaves(x)])

    def eps(self, x: Any) -> float:
        return max(float(np.finfo(a.dtype).eps) for a in leaves(x))

    def size(self, x: Any) -> int:
        return sum(a.size for a in leaves(x))

    def stack_like(self, x: Any, count: int) -> Any:
        return [self.zeros_like(x) for _ in range(count)]

    def put(self, stack: Any, i: Any, x: Any) -> Any:
        return [x if k == i.item() else old for k, old in enumerate(stack)]

    def take(self, stack: Any, i: Any) -> Any:
        return stack[i.item()]

    def project(self, stack: Any, x: Any) -> Any:
        return np.stack([self.dot(y, x) for y in stack])

    def combine(self, coefficients: Any, stack: Any) -> Any:
        total = self.zeros_like(stack[0])
        for k, x in enumerate(stack):
            total = self.axpy(coefficients[k], x, total)
        return total

    def sequence(self, items: Any) -> Any:
        return lambda i: items[(i.item() if hasattr(i, "item") else i) % len(items)]

    def while_loop(self, live: Any, body: Any, state: Any, max_steps: int) -> Any:
        return loops.while_loop(live, body, state, max_steps)

    def scan(self, body: Any, state: Any, xs: Any, length: int, reverse: bool = False) -> Any:
        return loops.scan(body, state, xs, length, reverse)

    def cond(self, flag: Any, body: Any, state: Any) -> Any:
        return body(state) if flag else state

    def ravel(self, x: Any) -> Any:
        return np.concatenate([np.ravel(a) for a in leaves(x)])

    def unravel(self, array: Any, like: Any) -> Any:
        parts = iter(np.split(boxed.unbox(array), np.cumsum([a.size for a in leaves(like)])[:-1]))
        return tree_map(lambda a: cast(next(parts).reshape(a.shape), a.dtype), like)

    def dense(self, operator: Any, like: Any) -> Any:
        units = np.eye(self.size(like), dtype=self.ravel(like).dtype)
        return np.stack([self.ravel(operator(self.unravel(boxed.Array(e), like))) for e in units], axis=1)

    def on_host(self, function: Any, *arrays: Any) -> Any:
        return cast(function(*(np.asarray(a.data, np.float64) for a in arrays)), arrays[-1].dtype)
