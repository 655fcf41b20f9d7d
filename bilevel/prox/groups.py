"""Groups of features: one value for each group, in NumPy, torch and JAX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from bilevel.spaces.namespace import namespace


class Groups(tuple[int, ...]):
    """The index of the group of each feature. -1 is no group. Equal groups are equal and have the same hash."""

    @cached_property
    def indices(self) -> np.ndarray:
        """The same as an array."""
        return np.array(self, np.int64)

    @cached_property
    def lowest(self) -> int:
        """The smallest index."""
        return min(self)

    @cached_property
    def highest(self) -> int:
        """The largest index."""
        return max(self)


def check_groups(groups: Sequence[int] | None, least: int = 0) -> Groups | None:
    """Return the index of the group of each feature. Raise a ValueError unless it is a list of indices >= least."""
    if groups is None:
        return None
    indices = np.asarray(groups)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or (indices < least).any():
        raise ValueError(
            f"groups: expected the index of its group, an integer >= {least}, for each feature, got an array of "
            f"{indices.dtype} of shape {indices.shape}."
        )
    return Groups(indices.tolist())


def in_features(name: str, value: Any, v: Any, groups: Groups | None) -> Any:
    """Return a value per feature from a value per group: zero for group -1. A shared value, of shape (), stays."""
    if groups is None or not value.ndim:
        return value
    if len(groups) != v.shape[0] or groups.highest >= value.shape[0]:
        raise ValueError(
            f"groups: expected {v.shape[0]} indices, one for each row of params, below {value.shape[0]}, the number of "
            f"entries of {name}, got {len(groups)} indices from {groups.lowest} to {groups.highest}."
        )
    return gathered(value, groups)


def gathered(value: Any, groups: Groups) -> Any:
    """Return a value per feature from a value per group: zero for group -1."""
    if groups.lowest < 0:
        xp = namespace(value)
        value = xp.concatenate([value, xp.zeros_like(value[:1])])
    return value[groups.indices]


def summed(product: Any, groups: Groups, count: int) -> Any:
    """Return the sums of a product like params over the features of each group, without group -1 (NumPy)."""
    per_feature, indices = product.sum(tuple(range(1, product.ndim))), groups.indices
    grouped = indices >= 0
    return sums_of_groups(per_feature[grouped], indices[grouped], count)


def sums_of_groups(x: Any, indices: Any, count: int) -> Any:
    """Return the sums of the entries of x, of shape (d,), by group. ``indices`` has d integers below ``count``."""
    if hasattr(x, "new_zeros"):
        return x.new_zeros(count).index_add(0, namespace(x).as_tensor(indices, device=x.device), x)
    if hasattr(x, "at"):  # JAX
        return namespace(x).zeros(count, dtype=x.dtype).at[indices].add(x)
    return np.bincount(indices, x, count).astype(x.dtype)
