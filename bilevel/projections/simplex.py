"""The simplex and the L1 ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.operator import Given, Projection, given
from bilevel.spaces.namespace import namespace


def simplex(radius: Given = 1.0) -> Simplex:
    """Return the projection on the simplex {w: w >= 0, Σ w = radius}, by sorting (Duchi et al., ICML 2008, figure 1).

    Args:
        radius: a number > 0. None: hparams itself. A string: ``hparams[string]``. Its shape is ().

    Returns:
        An operator (v, hparams) for `bilevel.Projected`. v has shape (d,), or (n, d): each row is in a simplex.

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> simplex()(np.array([0.5, 1.0, -1.0]), None)
    array([0.25, 0.75, 0.  ])
    """
    return Simplex(given("radius", radius, "a number > 0"))


def l1_ball(radius: Given = None) -> L1Ball:
    """Return the projection on the ball {w: Σ |w| <= radius} (Duchi et al., ICML 2008, §4): the constrained lasso.

    Args:
        radius: as in `simplex`. By default, hparams itself.

    Returns:
        An operator (v, hparams) for `bilevel.Projected`. v has any shape.

    Raises:
        TypeError, ValueError: as in `simplex`.

    >>> import numpy as np
    >>> l1_ball(1.0)(np.array([0.5, -1.0]), None)
    array([ 0.25, -0.75])
    """
    return L1Ball(given("radius", radius, "a number > 0"))


@dataclass(frozen=True)
class Simplex(Projection):
    """See `simplex`."""

    values: ClassVar[tuple[str, ...]] = ("radius",)

    radius: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        return on_simplex(v, values[0])

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        support = _support(v, values[0])
        mean = (c * support).sum(-1, keepdims=True) / support.sum(-1, keepdims=True)
        return support * (c - mean), [np.asarray(mean.sum())]


@dataclass(frozen=True)
class L1Ball(Projection):
    """See `l1_ball`."""

    values: ClassVar[tuple[str, ...]] = ("radius",)

    radius: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        xp, flat = namespace(v), v.reshape(-1)
        on_ball = xp.sign(flat) * on_simplex(xp.abs(flat), values[0])
        return xp.where(xp.abs(flat).sum() > values[0], on_ball, flat).reshape(v.shape)

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        if np.abs(v).sum() <= values[0]:
            return c, [np.zeros_like(values[0])]
        signs = np.sign(v) * _support(np.abs(v).reshape(-1), values[0]).reshape(v.shape)
        mean = (signs * c).sum() / np.abs(signs).sum()
        return np.abs(signs) * c - signs * mean, [np.asarray(mean)]


def on_simplex(v: Any, radius: Any) -> Any:
    """Return the projection of each row: max(v − θ, 0), with the θ for which the sum is the radius."""
    xp, support = namespace(v), _support(v, radius)
    zero = xp.zeros_like(v)
    theta = (xp.where(support, v, zero).sum(-1) - radius) / support.sum(-1)
    return xp.where(support, v - theta[..., None], zero)


def _support(v: Any, radius: Any) -> Any:
    """Return a mask of the entries that are not zero after the projection."""
    if radius.ndim:
        raise ValueError(f"radius: expected shape (), got {tuple(radius.shape)}.")
    xp = namespace(v)
    ordered = -(xp.sort(-v, -1).values if hasattr(v, "new_tensor") else xp.sort(-v, -1))
    places = xp.cumsum(xp.ones_like(v), -1)
    thetas = (xp.cumsum(ordered, -1) - radius) / places
    count = (ordered > thetas).sum(-1)[..., None]  # at least one for a radius > 0
    theta = xp.where(places == count, thetas, xp.zeros_like(thetas)).sum(-1)
    return v > theta[..., None]
