"""Trees of tensors on the CPU as vectors, with NumPy's numbers as scalars."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from bilevel.spaces.array import V
from bilevel.spaces.space import State
from bilevel.spaces.tree import leaves
from bilevel_torch.space import TorchSpace, product


class _NumbersAndTensors:
    """Functions of NumPy's numbers, and of tensors. A result of shape () is a number."""

    def __getattr__(self, name: str) -> Any:
        of_tensors = getattr(TorchSpace.xp, name)
        of_numbers = getattr(np, name, None)
        if of_numbers is None or not callable(of_numbers) or isinstance(of_numbers, type):  # bfloat16, linalg, int32
            return of_tensors

        def function(*args: Any, **options: Any) -> Any:
            for a in args:  # a generator would take three times as long
                if isinstance(a, torch.Tensor):
                    return _number(of_tensors(*map(_tensor, args), **options))
            return of_numbers(*args, **options)

        setattr(self, name, function)
        return function

    def finfo(self, dtype: Any) -> Any:
        return torch.finfo(dtype) if isinstance(dtype, torch.dtype) else np.finfo(dtype)

    def zeros_like(self, x: Any, dtype: Any = None) -> Any:
        return self.full_like(x, 0, dtype)

    def ones_like(self, x: Any, dtype: Any = None) -> Any:
        return self.full_like(x, 1, dtype)

    def full_like(self, x: Any, value: Any, dtype: Any = None) -> Any:
        if isinstance(x, torch.Tensor):
            return _number(torch.full_like(x, value, dtype=dtype))
        return (np.int32 if dtype is torch.int32 else type(x))(value)

    def stack(self, arrays: Any) -> torch.Tensor:
        return torch.stack([*map(_tensor, arrays)])

    def where(self, flag: Any, x: Any, y: Any) -> Any:
        if isinstance(flag, torch.Tensor):
            return _number(torch.where(flag, _tensor(x), _tensor(y)))
        chosen, other = (x, y) if flag else (y, x)
        if isinstance(other, torch.Tensor) and other.ndim and not isinstance(chosen, torch.Tensor):
            return torch.full_like(other, chosen)
        return type(other)(chosen) if isinstance(other, np.generic) else chosen


def _number(x: Any) -> Any:
    """Return a tensor of shape () as a number."""
    return x if x.ndim else x.numpy()[()]


def _ends(x: torch.Tensor) -> list[float]:
    """Return the smallest and the largest entry. Both are nan if an entry is nan.

    This is one pass. A pass over ``torch.isfinite(x)`` by ``all`` takes thirty times as long.
    """
    return [end.item() for end in x.aminmax()] if x.numel() else []


def _tensor(x: Any) -> Any:
    """Return a number as a tensor of shape ()."""
    return torch.as_tensor(x) if isinstance(x, np.generic) else x


class CpuSpace(TorchSpace[V]):
    """See `TorchSpace`. On the CPU, reading a tensor is free, and NumPy's arithmetic of scalars is faster by far.

    So scalars are NumPy's numbers. All arrays of other shapes are tensors.
    """

    xp = _NumbersAndTensors()

    @property
    @override
    def leaf_xp(self) -> Any:
        return TorchSpace.xp

    @override
    def leaf(self, scalar: Any) -> Any:
        return _tensor(scalar)

    @override
    def dot(self, x: V, y: V) -> Any:
        total, scalar = 0.0, np.float32
        for a, b in zip(leaves(x), leaves(y), strict=True):
            total += product(a.reshape(-1), b.reshape(-1)).item()
            if a.dtype == torch.float64 or b.dtype == torch.float64:
                scalar = np.float64
        return scalar(total)

    @override
    def max_abs(self, x: V) -> Any:
        ends = [end for leaf in leaves(x) for end in _ends(leaf)]
        wide = any(leaf.dtype == torch.float64 for leaf in leaves(x))
        return (np.float64 if wide else np.float32)(np.abs(ends).max(initial=0.0))

    @override
    def isfinite(self, x: object) -> Any:
        return np.bool_(all(isfinite(end) for leaf in leaves(x) for end in _ends(leaf)))

    @override
    def set(self, stack: Any, i: Any, x: V) -> Any:
        return super().set(stack, _tensor(i), x)

    @override
    def get(self, stack: Any, i: Any) -> V:
        return super().get(stack, _tensor(i))

    @override
    def while_loop(
        self, live: Callable[[State], Any], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        with np.errstate(all="ignore"):  # a status reports numbers that are not finite
            return super().while_loop(live, body, state, max_steps)

    @override
    def _number(self, alpha: Any) -> Any:
        return alpha.item() if isinstance(alpha, torch.Tensor | np.generic) else alpha

    @override
    def _reads_freely(self, flag: object) -> bool:
        return True
