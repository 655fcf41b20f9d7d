"""How close a point must be to a kink to count as at it."""

from typing import Any

from bilevel.spaces.array import Array, P
from bilevel.spaces.space import Space

WIDEST = 10.0  # residuals: the largest distance of a kink that counts as zero
ROUNDING = 100.0  # machine epsilons: the least such distance, relative to the largest entry


def kink_width(space: Space[P], residual: P, largest: Array) -> Any:
    """Return the distance of a kink that counts as zero: rounding, or the error of params.

    The residual at params measures this error. ``largest`` is the largest entry of the compared quantities.
    """
    xp = space.xp
    size = xp.where(largest > 0, largest, 1.0)
    return xp.clip(WIDEST * space.max_abs(residual), ROUNDING * space.eps * size, space.eps**0.5 * size)
