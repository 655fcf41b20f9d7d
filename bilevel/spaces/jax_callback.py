"""NumPy functions in compiled functions of JAX."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def jax_callback(function: Callable[..., np.ndarray], like: Any, *arrays: Any) -> Any:
    """Return function(*arrays), computed by NumPy on the host, in the shape and dtype of ``like``.

    64-bit numbers pass as pairs of 32 bits. JAX may run a callback in a thread that does not see the caller's
    ``jax.enable_x64``, and converts its arguments and its result to 32 bits there (findings/).

    ``vmap`` calls the function for each row.
    """
    jax = sys.modules["jax"]
    dtypes = [np.dtype(array.dtype) for array in arrays]

    def call(*passed: Any) -> np.ndarray:
        result = function(*(_array(x, dtype) for x, dtype in zip(passed, dtypes, strict=True)))
        return _pairs(np.asarray(result, like.dtype))

    def packed(x: Any) -> Any:
        return jax.lax.bitcast_convert_type(x, np.uint32) if _is_wide(x.dtype) else x

    shape, wide = tuple(like.shape), _is_wide(like.dtype)
    result = jax.ShapeDtypeStruct((*shape, 2) if wide else shape, np.uint32 if wide else like.dtype)
    found = jax.pure_callback(call, result, *map(packed, arrays), vmap_method="sequential")
    return jax.lax.bitcast_convert_type(found, like.dtype) if wide else found


def _is_wide(dtype: Any) -> bool:
    return np.dtype(dtype) in (np.float64, np.int64, np.uint64)


def _array(passed: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Return an argument in its dtype."""
    array = np.asarray(passed)
    return np.ascontiguousarray(array).view(dtype).reshape(array.shape[:-1]) if _is_wide(dtype) else array


def _pairs(array: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers as pairs of 32 bits, along a new last axis."""
    if not _is_wide(array.dtype):
        return array
    return np.ascontiguousarray(array).reshape(*array.shape, 1).view(np.uint32)
