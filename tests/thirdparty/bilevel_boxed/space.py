"""Trees of boxed arrays as vectors. NumPy's functions take boxed arrays, so that NumPy is the namespace."""

from typing import Any

import boxed
import numpy as np

from bilevel.spaces.space import Space


class BoxedSpace(Space[Any]):
    def cast(self, value: Any, like: Any) -> Any:
        return boxed.Array(np.asarray(boxed.unbox(value), like.dtype))

    def dot(self, x: Any, y: Any) -> Any:
        return sum(np.vdot(a, b) for a, b in zip(self.leaves(x), self.leaves(y), strict=True))

    def normal(self, seed: int, count: int | None = None) -> Any:
        rng = np.random.default_rng(seed)
        vectors = [self.map(lambda a: rng.standard_normal(a.shape), self.like) for _ in range(count or 1)]
        return vectors[0] if count is None else vectors

    def ravel(self, x: Any) -> Any:
        return np.concatenate([np.ravel(a) for a in self.leaves(x)])

    def unravel(self, array: Any) -> Any:
        parts = iter(np.split(array, np.cumsum([a.size for a in self.leaves(self.like)])[:-1]))
        return self.map(lambda a: np.reshape(next(parts), a.shape), self.like)

    def numpy_callback(self, function: Any, *arrays: Any) -> Any:
        return self.cast(function(*(np.asarray(a.data, np.float64) for a in arrays)), arrays[-1])
