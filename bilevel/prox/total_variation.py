"""The total variation of a sequence: the fused lasso."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.groups import sums_of_groups
from bilevel.prox.operator import Given, ProximalOperator, given, without_derivative
from bilevel.spaces.jax_callback import jax_callback
from bilevel.spaces.namespace import namespace


def total_variation(penalty: Given = None) -> TotalVariation:
    """Return the proximal operator of g(w) = exp(λ) Σ |w_{i+1} − w_i|, which makes w piecewise constant.

    It is the direct algorithm of Condat (IEEE Signal Processing Letters 2013). It runs on the host, in Python, in most
    cases in a time in proportion to the length; in JAX, by a callback. The derivative is the mean over each constant
    piece. It exists unless two pieces are about to join, or one is about to split. Second derivatives are zero.

    Args:
        penalty: λ, as in `l1`, of shape ().

    Returns:
        An operator (v, hparams, step_size) for `bilevel.Proximal`. v has shape (d,).

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> total_variation(1.0)(np.array([0.0, 1.0, 5.0, 7.0]), None, 1.0)
    array([1., 1., 5., 6.])
    """
    return TotalVariation(given("penalty", penalty, "numbers >= 0"))


@dataclass(frozen=True)
class TotalVariation(ProximalOperator):
    """See `total_variation`."""

    values: ClassVar[tuple[str, ...]] = ("penalty",)
    logs: ClassVar[frozenset[str]] = frozenset(values)

    penalty: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        threshold = step * values[0]
        pieces, pushed = _pieces(v, threshold)
        return _means(v + threshold * pushed, pieces)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        pieces, pushed = _pieces(v, step * values[0])
        mean = _means(c, pieces)
        return mean, [np.asarray(step * (mean * pushed).sum())]


def _pieces(v: Any, threshold: Any) -> tuple[Any, Any]:
    """Return the piece of each entry, and entries whose sum over a piece is the derivative by the threshold."""
    if v.ndim != 1 or threshold.ndim:
        raise ValueError(
            f"total_variation: expected params of shape (d,) and a penalty of shape (), got {tuple(v.shape)} and "
            f"{tuple(threshold.shape)}."
        )
    xp = namespace(v)
    jumps = xp.sign(xp.diff(_on_host(without_derivative(v), without_derivative(threshold))))
    edge = 0 * jumps[:1] if len(v) > 1 else 0 * v
    pieces = xp.cumsum(xp.abs(jumps), 0)
    return xp.concatenate([edge, pieces]), xp.diff(xp.concatenate([edge, jumps, edge])) if len(v) > 1 else edge


def _means(x: Any, pieces: Any) -> Any:
    """Return the mean of the piece of each entry."""
    pieces = pieces.long() if hasattr(pieces, "long") else pieces.astype(int)
    count = len(x)
    sizes = sums_of_groups(namespace(x).ones_like(x), pieces, count)
    means = sums_of_groups(x, pieces, count) / namespace(x).where(sizes > 0, sizes, namespace(x).ones_like(sizes))
    return means[pieces]


def _on_host(v: Any, threshold: Any) -> Any:
    """Return the solution, computed in float64 by NumPy."""
    if hasattr(v, "new_tensor"):
        return v.new_tensor(denoised(v.double().cpu().numpy(), float(threshold)))
    if isinstance(v, np.ndarray | np.generic):
        return denoised(np.asarray(v, np.float64), float(threshold))
    return jax_callback(lambda v, threshold: denoised(v.astype(np.float64), float(threshold)), v, v, threshold)


def denoised(y: Any, threshold: float) -> np.ndarray:
    """Return argmin over x of ½ ‖x − y‖² + threshold · Σ |x_{i+1} − x_i|. All entries of a piece are equal."""
    if not (np.isfinite(y).all() and np.isfinite(threshold)):
        return np.full_like(y, np.nan)
    values = y.tolist()
    piece, last = _Piece(values, threshold), len(values) - 1
    while piece.start <= last:
        if piece.k < last:
            piece.extend()
        else:
            piece.finish()
    return np.array(piece.x)


class _Piece:
    """The current piece of Condat's algorithm: it starts at ``start``, and has reached ``k``.

    Attributes:
        x: the values of the closed pieces.
        low, high: the bounds of the value of the piece.
        low_sum, high_sum: the dual variables at k for these two values.
        low_end, high_end: the last places where the piece may end, with a jump down or up.
    """

    def __init__(self, y: list[float], threshold: float) -> None:
        self.y, self.threshold, self.x = y, threshold, list[float]()
        self.start = self.k = self.low_end = self.high_end = 0
        self.low, self.high = y[0] - threshold, y[0] + threshold
        self.low_sum, self.high_sum = threshold, -threshold

    def extend(self) -> None:
        """Move to the next entry. Close the piece if it cannot contain it."""
        t, k = self.threshold, self.k
        low_sum, high_sum = self.low_sum + self.y[k + 1] - self.low, self.high_sum + self.y[k + 1] - self.high
        if low_sum < -t or high_sum > t:
            down = low_sum < -t
            start = self._close(self.low_end if down else self.high_end, self.low if down else self.high)
            self.k = self.low_end = self.high_end = start
            self.low, self.high = (
                (self.y[start], self.y[start] + 2 * t) if down else (self.y[start] - 2 * t, self.y[start])
            )
            self.low_sum, self.high_sum = t, -t
            return
        self.k, self.low_sum, self.high_sum = k + 1, low_sum, high_sum
        length = self.k - self.start + 1
        if low_sum >= t:
            self.low_end, self.low, self.low_sum = self.k, self.low + (low_sum - t) / length, t
        if high_sum <= -t:
            self.high_end, self.high, self.high_sum = self.k, self.high + (high_sum + t) / length, -t

    def finish(self) -> None:
        """Close a piece that has reached the last entry, where the dual variable must be zero."""
        t, y = self.threshold, self.y
        if self.low_sum < 0:
            self.k = self.low_end = start = self._close(self.low_end, self.low)
            self.low, self.low_sum = y[start], t
            self.high_sum = self.low + t - self.high
        elif self.high_sum > 0:
            self.k = self.high_end = start = self._close(self.high_end, self.high)
            self.high, self.high_sum = y[start], -t
            self.low_sum = self.high - t - self.low
        else:
            self._close(len(y) - 1, self.low + self.low_sum / (len(y) - self.start))

    def _close(self, end: int, value: float) -> int:
        """Give the entries up to ``end`` their value. Return the start of the next piece."""
        self.x += [value] * (end + 1 - self.start)
        self.start = end + 1
        return self.start
