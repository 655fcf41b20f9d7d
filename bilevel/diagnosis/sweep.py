"""Compare a derivative with central differences of its source.

Steps are relative to the size of the weights and decrease over six decades. The smallest error counts: long steps cross
kinks (relu, max-pooling), and short steps have large rounding errors. The differences between neighbouring steps
measure the noise.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.spaces.array import Array, V

SMALL = 0.01  # the error of a smaller leaf is relative to this share of the whole tree


class Agreement(NamedTuple):
    """The comparison of one derivative with differences, along a random direction.

    Attributes:
        name: the name of the derivative in `agreement.DERIVATIVES`. For an equation, its residual is the "inner grad".
        source: the function of the differences: "inner", "inner grad" or "outer".
        leaf: the path of the leaf with the largest error; "" for a single number.
        error: the distance of derivative and difference, relative to the larger value.
        noise: the noise of the differences, in the same units.
        tolerance: the largest allowed ``error``: the fourth root of the machine epsilon, 1e-4 in float64.
        claimed, measured: the derivative along the direction, and the nearest difference.
    """

    name: str
    source: str
    leaf: str
    error: float
    noise: float
    tolerance: float
    claimed: float
    measured: float

    @property
    def wrong(self) -> bool:
        """Whether the derivative contradicts the differences."""
        return self.error > max(self.tolerance, 10 * self.noise)

    @property
    def unclear(self) -> bool:
        """Whether the differences are too noisy for a decision."""
        return not (self.wrong or self.error <= self.tolerance)

    def sentence(self) -> str:
        """Return the text for a wrong derivative."""
        where = f", worst in {self.leaf}" if self.leaf else ""
        return (
            f"{self.name} contradicts differences of {self.source} along a random direction: {self.claimed:.6g} "
            f"against {self.measured:.6g} (relative error {self.error:.2g}{where}; noise {self.noise:.1g})."
        )


class Sweep(Generic[V]):
    """A comparison of a tree with differences for decreasing steps, leaf by leaf."""

    def __init__(self, backend: Backend, claimed: V, tolerance: float) -> None:
        self.backend, self.claimed, self.tolerance = backend, claimed, tolerance
        self.last, self.nearest, self.nearest_error = None, claimed, np.inf
        # For each step and leaf: the size of the difference, and its distances from the claim and the last difference.
        self.sizes: list[np.ndarray] = []
        self.errors: list[np.ndarray] = []
        self.spreads: list[np.ndarray] = []
        self.roundings: list[np.ndarray] = []
        self.claimed_size = self._norms(claimed)

    @property
    def agrees(self) -> bool:
        """Whether each leaf agrees at some step, to a hundredth of the tolerance."""
        return bool(self.errors) and bool((_least(self.errors) <= 0.01 * self.tolerance).all())

    def add(self, high: V, low: V, t: float) -> None:
        """Add the differences of the next step t, from the values at t and −t."""
        space = self.backend.space(high)
        measured = space.scale(0.5 / t, space.subtract(high, low))
        size, distance = self._norms(measured), self._distance(measured, self.claimed)
        scale = np.maximum(self.claimed_size, size)
        scale = np.maximum(scale, SMALL * np.linalg.norm(scale))
        scale[scale == 0] = 1.0  # both values are zero
        if np.linalg.norm(distance) < self.nearest_error:
            self.nearest, self.nearest_error = measured, float(np.linalg.norm(distance))
        self.sizes.append(size)
        self.errors.append(distance / scale)
        self.roundings.append(space.eps / t * self._norms(high) / scale)
        if self.last is not None:
            self.spreads.append(self._distance(measured, self.last) / scale)
        self.last = measured

    def result(self, name: str, source: str, along: Array, measure: Callable[[V], Array]) -> Agreement:
        """Return the agreement of the leaf with the largest error."""
        errors, noise = _least(self.errors), self._noise()
        with np.errstate(invalid="ignore"):
            worst = int(np.argmax(errors / np.maximum(self.tolerance, 10 * noise)))
        path, host = self.backend.leaves(self.claimed)[worst][0], self.backend.to_host
        return Agreement(
            name=name,
            source=source,
            leaf=f"params{path}" if path else "",
            error=float(errors[worst]),
            noise=float(noise[worst]),
            tolerance=self.tolerance,
            claimed=float(host(along)),
            measured=float(host(measure(self.nearest))),
        )

    def _noise(self) -> np.ndarray:
        """Return the uncertainty of each leaf at its most consistent steps; zero if two steps were enough."""
        if len(self.sizes) < 3:
            return np.zeros_like(self.claimed_size)
        sizes, errors, spreads = np.array(self.sizes), np.array(self.errors), np.array(self.spreads)
        # Two zero differences: a coarser dtype in the objective rounds the steps away.
        spreads[(sizes[1:] == 0) & (sizes[:-1] == 0) & sizes.any(axis=0)] = np.inf
        # Three neighbours must be close, since two may be close by chance, and no other step may have a smaller error.
        around = np.where(np.isnan(errors[1:-1]), np.inf, spreads[1:] + spreads[:-1])
        best = around.argmin(axis=0)[None]
        with np.errstate(invalid="ignore"):
            open_ = np.take_along_axis(around, best, 0) + np.take_along_axis(errors[1:-1], best, 0) - _least(errors)
        # If rounding hides the derivative at the longest step, it hides it at all steps.
        return np.maximum(np.nan_to_num(open_[0], nan=np.inf, posinf=np.inf), _least(self.roundings))

    def _norms(self, tree: V) -> np.ndarray:
        norms = (self.backend.space(leaf).norm(leaf) for _, leaf in self.backend.leaves(tree))
        return np.array([float(self.backend.to_host(norm)) for norm in norms])

    def _distance(self, x: V, y: V) -> np.ndarray:
        return self._norms(self.backend.space(x).subtract(x, y))


def _least(rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the smallest number of each column, or infinity if all are nan."""
    return np.where(np.isnan(rows), np.inf, rows).min(axis=0)
