"""The nuclear norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.operator import Given, ProximalOperator, given, soft_threshold, without_derivative
from bilevel.spaces.namespace import namespace


def nuclear_norm(penalty: Given = None) -> NuclearNorm:
    """Return the proximal operator of g(W) = exp(λ) Σ σᵢ(W), soft thresholding of singular values (§6.7.3).

    The section is of Parikh & Boyd (2014). The derivative is the formula of Deledalle, Vaiter, Peyré, Fadili & Dossal
    (2012), which needs no distinct singular values. It exists unless a singular value equals the threshold. Second
    derivatives of the operator are zero.

    Args:
        penalty: λ, as in `l1`, of shape ().

    Returns:
        An operator (v, hparams, step_size) for `bilevel.Proximal`. v has shape (m, n).

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> nuclear_norm(1.0)(np.diag([3.0, 0.5]), None, 2.0).round(3) + 0.0
    array([[1., 0.],
           [0., 0.]])
    """
    return NuclearNorm(given("penalty", penalty, "numbers >= 0"))


@dataclass(frozen=True)
class NuclearNorm(ProximalOperator):
    """See `nuclear_norm`."""

    values: ClassVar[tuple[str, ...]] = ("penalty",)
    logs: ClassVar[frozenset[str]] = frozenset(values)

    penalty: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        # The value, plus the derivatives times changes that are zero: automatic differentiation of an SVD divides by
        # the differences of singular values.
        threshold = step * values[0]
        fixed, fixed_threshold = without_derivative(v), without_derivative(threshold)
        svd = _Thresholded(fixed, fixed_threshold)
        return svd.value + svd.product(v - fixed) + svd.slope * (threshold - fixed_threshold)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        svd = _Thresholded(v, step * values[0])
        return svd.product(c), [np.asarray(step * (svd.slope * c).sum())]


class _Thresholded:
    """A matrix with thresholded singular values, and its derivatives.

    Attributes:
        value: the matrix.
        slope: the derivative by the threshold.
    """

    def __init__(self, v: Any, threshold: Any) -> None:
        if v.ndim != 2 or threshold.ndim:
            raise ValueError(
                f"nuclear_norm: expected params of shape (m, n) and a penalty of shape (), got {tuple(v.shape)} and "
                f"{tuple(threshold.shape)}."
            )
        xp = namespace(v)
        self.wide = v.shape[0] < v.shape[1]
        self.u, s, vt = xp.linalg.svd(v.T if self.wide else v, full_matrices=False)
        self.vt, self.s, self.threshold = vt, s, threshold
        self.kept = soft_threshold(s, threshold)
        alive = self.s > threshold
        self.value = self._turned((self.u * self.kept) @ vt)
        self.slope = self._turned(-(self.u * alive) @ vt)

    def product(self, change: Any) -> Any:
        """Return the derivative along a change of the matrix. It is its own transpose."""
        xp, s, kept = namespace(change), self.s, self.kept
        change = change.T if self.wide else change
        inside = self.u.T @ change @ self.vt.T
        rest = change - self.u @ (self.u.T @ change)  # zero for a square matrix
        alive = s > self.threshold
        one, other = alive[:, None], alive[None, :]
        # The divided differences of soft thresholding. Those of its odd continuation are for the antisymmetric part.
        gap = xp.where(one != other, s[:, None] - s[None, :], xp.ones_like(inside))
        mixed = (kept[:, None] - kept[None, :]) / gap
        even = xp.where(one & other, xp.ones_like(inside), xp.where(one | other, mixed, xp.zeros_like(inside)))
        total = s[:, None] + s[None, :]
        odd = (kept[:, None] + kept[None, :]) / xp.where(total > 0, total, xp.ones_like(total))
        middle = even * (inside + inside.T) / 2 + odd * (inside - inside.T) / 2
        outside = rest @ self.vt.T * (kept / xp.where(s > 0, s, xp.ones_like(s)))
        return self._turned((self.u @ middle + outside) @ self.vt)

    def _turned(self, matrix: Any) -> Any:
        return matrix.T if self.wide else matrix
