"""An array library with a type of its own: arrays that keep NumPy's in a box, and let NumPy's functions in."""

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Array(NDArrayOperatorsMixin):
    def __init__(self, data: Any) -> None:
        self.data = np.asarray(data)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    size = property(lambda self: self.data.size)
    T = property(lambda self: Array(self.data.T))

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **options: Any) -> Any:
        return box(getattr(ufunc, method)(*unbox(args), **unbox(options)))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return box(function(*unbox(args), **unbox(options)))

    def __getitem__(self, index: Any) -> "Array":
        return Array(self.data[unbox(index)])

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __repr__(self) -> str:
        return f"boxed.Array({self.data!r})"

    def item(self) -> Any:
        return self.data.item()

    def reshape(self, *shape: Any) -> "Array":
        return Array(self.data.reshape(*shape))

    def sum(self) -> "Array":
        return Array(self.data.sum())


def unbox(x: Any) -> Any:
    if isinstance(x, Array):
        return x.data
    if isinstance(x, dict):
        return {key: unbox(value) for key, value in x.items()}
    return type(x)(map(unbox, x)) if type(x) in (list, tuple) else x


def box(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(box, x))
    return Array(x) if isinstance(x, np.ndarray | np.generic) else x
