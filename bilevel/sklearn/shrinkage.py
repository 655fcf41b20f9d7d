"""Cross-validation of penalties per group that stay near the shared penalties, unless the data say otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel.problems.k_fold import KFoldProblem
from bilevel.spaces.tree import tree_map

SPREAD = 0.5  # the standard deviation of a log penalty in the prior


@dataclass(frozen=True)
class ShrunkKFold(KFoldProblem):
    """Cross-validation plus ½ weight ‖λ − center‖², which keeps penalties per group from overfitting the folds.

    If the cross-validated loss of n examples is taken for a negative log likelihood, this is the posterior for log
    penalties that are normal around the shared ones. Its weight is 1/(n SPREAD²), in the units of the loss.
    """

    center: Any
    weight: float

    @property
    def outer(self) -> Any:
        """The mean of the outer objectives over the folds, plus the penalty."""
        return _Shrunk(super().outer, self.center, self.weight)


@dataclass(frozen=True)
class _Shrunk:
    outer: Any
    center: Any
    weight: float

    def __call__(self, params: Any, hparams: Any, *args: Any) -> Any:
        squares = tree_map(lambda h, c: ((h - c) ** 2).sum(), hparams, self.center)
        total = sum(squares.values()) if isinstance(squares, dict) else squares
        return self.outer(params, hparams, *args) + 0.5 * self.weight * total

    def grad(self, params: Any, hparams: Any, *args: Any) -> Any:
        """Return (∂F/∂w, ∂F/∂λ). The losses of linear models do not depend on λ."""
        by_params, _ = self.outer.grad(params, hparams, *args)
        return by_params, tree_map(lambda h, c: self.weight * (h - c), hparams, self.center)
