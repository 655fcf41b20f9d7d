"""The Euclidean ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.operator import Given, Projection, given
from bilevel.spaces.namespace import namespace


def l2_ball(radius: Given = None) -> L2Ball:
    """Return the projection on the ball {w: ‖w‖₂ <= radius} (Parikh & Boyd 2014, §6.5.1).

    Args:
        radius: a number > 0. None: hparams itself. A string: ``hparams[string]``. Its shape is ().

    Returns:
        An operator (v, hparams) for `bilevel.Projected`. v has any shape; the norm is of all its entries.

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> l2_ball(1.0)(np.array([3.0, 4.0]), None)
    array([0.6, 0.8])
    """
    return L2Ball(given("radius", radius, "a number > 0"))


@dataclass(frozen=True)
class L2Ball(Projection):
    """See `l2_ball`."""

    values: ClassVar[tuple[str, ...]] = ("radius",)

    radius: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        xp, radius = namespace(v), values[0]
        if radius.ndim:
            raise ValueError(f"radius: expected shape (), got {tuple(radius.shape)}.")
        square = (v * v).sum()
        outside = square > radius**2
        norm = xp.sqrt(xp.where(outside, square, xp.ones_like(square)))
        return xp.where(outside, v * (radius / norm), v)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        norm = np.sqrt((v * v).sum())
        if norm <= values[0]:
            return c, [np.zeros_like(values[0])]
        unit = v / norm
        radial = (unit * c).sum()
        return values[0] / norm * (c - unit * radial), [np.asarray(radial)]
