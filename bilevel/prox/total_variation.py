"""The total variation of a sequence: the fused lasso."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.groups import sums_of_groups
from bilevel.prox.operator import Given, ProximalOperator, given, without_derivative
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
    return TotalVariation(given("penalty", penalty))


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
    jax = sys.modules["jax"]

    def on_host(v: Any, threshold: Any) -> np.ndarray:
        return denoised(np.asarray(v, np.float64), float(threshold)).astype(v.dtype)

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct(v.shape, v.dtype), v, threshold, vmap_method="sequential")


def denoised(y: Any, threshold: float) -> np.ndarray:
    """Return argmin over x of ½ ‖x − y‖² + threshold · Σ |x_{i+1} − x_i|. All entries of a piece are equal."""
    x, last = np.empty_like(y), len(y) - 1
    if not (np.isfinite(y).all() and np.isfinite(threshold)):
        return np.full_like(y, np.nan)
    k = start = low_end = high_end = 0
    low, high = y[0] - threshold, y[0] + threshold  # bounds of the value of the piece
    low_sum, high_sum = threshold, -threshold  # the dual variables for these values

    def close(end: int, value: float) -> int:
        x[start : end + 1] = value
        return end + 1

    while True:
        if k == last:
            if low_sum < 0:
                start = close(low_end, low)
                k = low_end = start
                low, low_sum = y[k], threshold
                high_sum = low + threshold - high
            elif high_sum > 0:
                start = close(high_end, high)
                k = high_end = start
                high, high_sum = y[k], -threshold
                low_sum = high - threshold - low
            else:
                close(last, low + low_sum / (last - start + 1))
                return x
            continue
        low_sum += y[k + 1] - low
        high_sum += y[k + 1] - high
        if low_sum < -threshold:
            start = close(low_end, low)
            k = low_end = high_end = start
            low, high = y[k], y[k] + 2 * threshold
            low_sum, high_sum = threshold, -threshold
        elif high_sum > threshold:
            start = close(high_end, high)
            k = low_end = high_end = start
            low, high = y[k] - 2 * threshold, y[k]
            low_sum, high_sum = threshold, -threshold
        else:
            k += 1
            if low_sum >= threshold:
                low_end = k
                low += (low_sum - threshold) / (k - start + 1)
                low_sum = threshold
            if high_sum <= -threshold:
                high_end = k
                high += (high_sum + threshold) / (k - start + 1)
                high_sum = -threshold
