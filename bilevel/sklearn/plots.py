"""Pictures of tuned estimators, as axes of matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from bilevel.plot.axes import axes
from bilevel.sklearn.tuned import TunedLinearModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 12  # features: more labels would overlap
SHOWN = 1e-12  # of the largest coefficient: smaller ones are drawn as zero


def plot_penalties(model: Any, ax: Axes | None = None) -> Axes:
    """Draw the penalty of each feature against the size of its coefficient.

    Args:
        model: a fitted estimator of `bilevel.sklearn`.
        ax: the axes to draw on. None: new ones.

    Returns:
        The axes. Each point is a feature. Grey points on the left, at the tick 0, have a coefficient of zero. With
        at most 12 features, the others have labels.

    Raises:
        TypeError: if the model is no estimator of `bilevel.sklearn`, such as a pipeline that contains one.
        NotFittedError: if the model is not fitted.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    _check(model, "alphas_")
    ax = axes(ax)
    sizes = np.abs(np.atleast_2d(model.coef_)).max(0)
    least = SHOWN * sizes.max(initial=0.0)
    zero = sizes <= least
    floor = 0.3 * (sizes[~zero].min() if not zero.all() else 1.0)
    x = np.where(zero, floor, sizes)
    for part, color, label in ((~zero, "C0", "features"), (zero, "0.6", "coefficient 0")):
        if part.any():
            ax.scatter(x[part], model.alphas_[part], s=20, color=color, label=label)
    names = getattr(model, "feature_names_in_", None)
    if len(x) <= NAMED:
        for j in np.flatnonzero(~zero):
            label = str(j) if names is None else str(names[j])
            ax.annotate(label, (x[j], model.alphas_[j]), xytext=(3, 3), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", yscale="log", xlabel="largest absolute coefficient", ylabel="penalty (alpha)")
    if zero.any():
        ax.set_xticks([floor], ["0"], minor=True)
        if zero.all():
            ax.set_xticks([])
        else:
            ax.axvline(1.7 * floor, color="0.8", linewidth=1)
        ax.legend()
    return ax


def plot_search(model: Any, ax: Axes | None = None) -> Axes:
    """Draw the cross-validated loss of each evaluation of the search. For regressors, it is half the squared error.

    Args:
        model: a fitted estimator of `bilevel.sklearn`.
        ax: the axes to draw on. None: new ones.

    Returns:
        The axes. Models with L1 penalties have tried a path of shared penalties first: these are the first points.

    Raises:
        TypeError, NotFittedError, ModuleNotFoundError: as in `plot_penalties`.
    """
    from matplotlib.ticker import MaxNLocator

    _check(model, "history_")
    ax = axes(ax)
    path = np.asarray(getattr(model, "path_errors_", []))
    values = [evaluation.value for evaluation in model.history_]
    if len(path):
        ax.plot(np.arange(1, len(path) + 1), path, "o-", color="0.6", label="path of shared penalties")
    ax.plot(len(path) + np.arange(1, len(values) + 1), values, "o-", color="C0", label="search by hypergradients")
    ax.set(xlabel="evaluation", ylabel="cross-validated loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def _check(model: Any, attribute: str) -> None:
    if not isinstance(model, TunedLinearModel):
        raise TypeError(
            f"expected an estimator of bilevel.sklearn, got {type(model).__name__}. From a pipeline, pass the step: "
            "pipeline[-1]."
        )
    check_is_fitted(model, attribute)
