"""Pictures of tuned estimators, as axes of matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 30  # features: with more, the axis shows their numbers
SHOWN = 1e-12  # of the largest coefficient: smaller ones are drawn as zero


def plot_penalties(model: Any, ax: Axes | None = None) -> Axes:
    """Draw the penalty of each feature against the size of its coefficient.

    Args:
        model: a fitted estimator of `bilevel.sklearn`.
        ax: the axes to draw on. None: new ones.

    Returns:
        The axes. Each point is a feature. Grey points on the left have a coefficient of zero. Up to 30 features have
        labels.

    Raises:
        NotFittedError: if the model is not fitted.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    check_is_fitted(model, "alphas_")
    ax = _axes(ax)
    sizes = np.abs(np.atleast_2d(model.coef_)).max(0)
    least = SHOWN * sizes.max(initial=0.0)
    zero = sizes <= least
    floor = 0.3 * sizes[~zero].min(initial=1.0)
    x = np.where(zero, floor, sizes)
    for part, color, label in ((~zero, "C0", "features"), (zero, "0.6", "coefficient 0")):
        if part.any():
            ax.scatter(x[part], model.alphas_[part], s=20, color=color, label=label)
    names = getattr(model, "feature_names_in_", None)
    if len(x) <= NAMED:
        for j, at in enumerate(zip(x, model.alphas_, strict=True)):
            label = str(j) if names is None else str(names[j])
            ax.annotate(label, at, xytext=(3, 3), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", yscale="log", xlabel="largest absolute coefficient", ylabel="penalty (alpha)")
    if zero.any():
        ax.legend()
    return ax


def plot_search(model: Any, ax: Axes | None = None) -> Axes:
    """Draw the cross-validated error of each evaluation of the search.

    Args:
        model: a fitted estimator of `bilevel.sklearn`.
        ax: the axes to draw on. None: new ones.

    Returns:
        The axes. Models with L1 penalties have tried a path of shared penalties first: these are the first points.

    Raises:
        NotFittedError, ModuleNotFoundError: as in `plot_penalties`.
    """
    from matplotlib.ticker import MaxNLocator

    check_is_fitted(model, "history_")
    ax = _axes(ax)
    path = np.asarray(getattr(model, "path_errors_", []))
    values = [evaluation.value for evaluation in model.history_]
    if len(path):
        ax.plot(np.arange(1, len(path) + 1), path, "o-", color="0.6", label="path of shared penalties")
    ax.plot(len(path) + np.arange(1, len(values) + 1), values, "o-", color="C0", label="search by hypergradients")
    ax.set(xlabel="evaluation", ylabel="cross-validated error")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
