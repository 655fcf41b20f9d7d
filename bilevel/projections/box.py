"""Bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.operator import Constant, Given, Projection, given, reduced, spread
from bilevel.spaces.namespace import namespace


def box(low: Given = -np.inf, high: Given = np.inf) -> Box:
    """Return the projection on {w: low <= w <= high} (Parikh & Boyd 2014, §6.2.4).

    Args:
        low, high: the bounds. A number or an array: constants. None: hparams itself. A string: ``hparams[string]``.
            The shape is (), (d,) (one for each row of params) or the shape of params.

    Returns:
        An operator (v, hparams) for `bilevel.Projected`.

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> box(0.0, "high")(np.array([-1.0, 2.0, 9.0]), {"high": np.array(5.0)})
    array([0., 2., 5.])
    """
    lowest, highest = given("low", low), given("high", high)
    if isinstance(lowest, Constant) and isinstance(highest, Constant) and (lowest.array > highest.array).any():
        raise ValueError(f"box: expected low <= high, got low={low!r} and high={high!r}.")
    return Box(lowest, highest)


def nonnegative() -> Box:
    """Return the projection on {w: w >= 0}, as in non-negative least squares.

    >>> import numpy as np
    >>> nonnegative()(np.array([-1.0, 2.0]), None)
    array([0., 2.])
    """
    return box(0.0)


@dataclass(frozen=True)
class Box(Projection):
    """See `box`."""

    values: ClassVar[tuple[str, ...]] = ("low", "high")

    low: Any
    high: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        xp = namespace(v)
        low, high = (spread(name, value, v) for name, value in zip(self.values, values, strict=True))
        return xp.where(v < low, low, xp.where(v > high, high, v))

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        low, high = (spread(name, value, v) for name, value in zip(self.values, values, strict=True))
        below, above = v < low, (v > high) & ~(v < low)
        return c * ~(below | above), [reduced(c * at, value) for at, value in zip((below, above), values, strict=True)]
