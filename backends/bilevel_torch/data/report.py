"""A table and a picture of learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bilevel.options import check_count
from bilevel.plot.axes import axes, check_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 60  # characters of a name in the table
SHORT = 25  # in the picture


@dataclass(frozen=True)
class WeightReport:
    """The sources or examples whose weights are largest and smallest. ``str(report)`` is a table.

    Args:
        weights: n finite weights >= 0, such as ``DataWeights(n)()``.
        names: a name or text for each weight. None: their numbers.
        most: the number of rows for each of the two ends.

    Raises:
        TypeError, ValueError: for invalid arguments; the message names the argument.

    >>> import torch
    >>> from bilevel_torch.data import WeightReport
    >>> print(WeightReport(torch.tensor([0.2, 1.8, 1.0]), ["forum", "wiki", "books"]))
    3 weights, mean 1.00, effective number 2.1
      weight  name
        1.80  wiki
        1.00  books
        0.20  forum

    The effective number is (Σw)² / Σw²: how many equal weights would give an estimate of the same variance (Kish,
    "Survey Sampling", 1965).
    """

    weights: torch.Tensor
    names: Sequence[str] | None = None
    most: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.weights, torch.Tensor) or self.weights.ndim != 1 or not len(self.weights):
            shape = tuple(getattr(self.weights, "shape", ()))
            raise ValueError(
                f"weights: expected a tensor of shape (n,), such as data_weights(), got {type(self.weights).__name__} "
                f"{shape}."
            )
        if self.weights.is_complex() or not bool((self.weights >= 0).all() and self.weights.isfinite().all()):
            raise ValueError("weights: expected finite numbers >= 0.")
        if self.names is not None:
            check_names(self.names, len(self.weights))
        check_count("most", self.most)

    def __str__(self) -> str:
        w = self.weights.detach().double()
        effective = float(w.sum() ** 2 / (w**2).sum()) if bool(w.any()) else 0.0
        lines = [f"{len(w)} weights, mean {float(w.mean()):.2f}, effective number {effective:.1f}", "  weight  name"]
        rows = [f"{float(w[i]):8.2f}  {self._name(i, WIDTH)}" for i in self._shown()]
        if len(rows) < len(w):
            rows.insert(self.most, f"     ...  {len(w) - len(rows)} more")
        return "\n".join(lines + rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the rows of the table as bars.

        Args:
            ax: the axes to draw on. None: new ones.

        Returns:
            The axes. The line is at the mean of all weights.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        ax = axes(ax)
        w, shown = self.weights.detach().double().cpu(), self._shown()
        places = [-(row + (row >= self.most and len(shown) < len(w))) for row in range(len(shown))]  # with a gap
        ax.barh(places, w[shown].tolist(), color=["C0" if w[i] >= w.mean() else "C1" for i in shown])
        ax.axvline(float(w.mean()), color="0.5", linewidth=1)
        ax.set_yticks(places, [self._name(i, SHORT) for i in shown], parse_math=False)
        ax.set(xlabel="weight")
        return ax

    def _shown(self) -> list[int]:
        """Return the numbers of the rows, by falling weights."""
        order = self.weights.detach().argsort(descending=True, stable=True).tolist()
        return order if len(order) <= 2 * self.most else order[: self.most] + order[-self.most :]

    def _name(self, i: int, width: int) -> str:
        text = " ".join(str(i if self.names is None else self.names[i]).split())
        return text if len(text) <= width else text[: width - 3] + "..."
