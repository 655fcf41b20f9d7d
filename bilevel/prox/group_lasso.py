"""The group lasso."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.groups import Groups, check_groups, in_features, sums_of_groups
from bilevel.prox.operator import Given, ProximalOperator, given
from bilevel.spaces.namespace import namespace


def group_lasso(groups: Sequence[int], penalty: Given = None) -> GroupLasso:
    """Return the proximal operator of g(w) = Σ_g exp(λ_g) ‖w_g‖₂, block soft thresholding (Parikh & Boyd 2014, §6.5.4).

    A group of zeros stays zero as a whole. For penalties in proportion to the root of the group's size, add half of the
    logarithm of the sizes to λ.

    Args:
        groups: for each of the d features, the index of its group.
        penalty: λ, as in `l1`, of shape () (shared) or (number of groups,).

    Returns:
        An operator (v, hparams, step_size) for `bilevel.Proximal`. v has shape (d,), or (d, k): a group has its rows.

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> group_lasso([0, 0, 1], 1.0)(np.array([3.0, 4.0, 0.5]), None, 2.5).round(3)
    array([1.5, 2. , 0. ])
    """
    indices = check_groups(groups)
    assert indices is not None
    return GroupLasso(given("penalty", penalty, "numbers >= 0"), indices)


@dataclass(frozen=True)
class GroupLasso(ProximalOperator):
    """See `group_lasso`."""

    values: ClassVar[tuple[str, ...]] = ("penalty",)
    logs: ClassVar[frozenset[str]] = frozenset(values)

    penalty: Any
    groups: Groups

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        xp, threshold = namespace(v), step * self._of_groups(values[0], v)
        square = self._sums(v * v, values[0])
        alive = square > threshold**2
        norm = xp.sqrt(xp.where(alive, square, xp.ones_like(square)))
        shrunk = xp.where(alive, 1 - threshold / norm, xp.zeros_like(square))
        return v * self._rows(shrunk, v)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        norm, threshold = np.sqrt(self._sums(v * v, values[0])), step * self._of_groups(values[0], v)
        alive = norm > threshold
        norm = np.where(alive, norm, 1.0)
        radial = alive * self._sums(v * c, values[0]) / norm  # per group, along the direction of v
        kept = c * self._rows(alive * (1 - threshold / norm), v)
        by_penalty = -step * radial
        by_value = by_penalty if values[0].ndim else by_penalty.sum()
        return kept + v * self._rows(threshold * radial / norm**2, v), [np.asarray(by_value)]

    def _of_groups(self, penalty: Any, v: Any) -> Any:
        """Return the penalty per group, and check the shapes."""
        in_features("penalty", penalty, v, self.groups)
        if len(self.groups) != v.shape[0]:
            raise ValueError(
                f"groups: expected {v.shape[0]} indices, one for each row of params, got {len(self.groups)}."
            )
        return penalty

    def _sums(self, x: Any, penalty: Any) -> Any:
        count = penalty.shape[0] if penalty.ndim else self.groups.highest + 1
        return sums_of_groups(x.reshape(x.shape[0], -1).sum(1), self.groups.indices, count)

    def _rows(self, of_groups: Any, v: Any) -> Any:
        """Return a value for each row of v from a value for each group."""
        return of_groups[self.groups.indices].reshape(-1, *(1,) * (v.ndim - 1))
