"""The course of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.options import check_choice
from bilevel.plot.axes import axes
from bilevel.results import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "value": "outer objective F",
    "grad_norm": "norm of the hypergradient",
    "steps": "iterations of the linear solve",
    "inner_grad_norm": "norm of the inner gradient",
}
DECADE = 10.0  # the least ratio of positive numbers that is drawn on a logarithmic scale


def history(result: Any, *, field: str = "value", ax: Axes | None = None) -> Axes:
    """Draw one number of each evaluation of a search.

    Red crosses mark evaluations whose linear solve did not converge. The scale is logarithmic if all numbers are
    positive and differ by a factor of ten or more. Numbers that are not finite leave gaps.

    Args:
        result: a result of `bilevel.minimize`, or its ``history``, such as ``history_`` of an estimator of
            `bilevel.sklearn`.
        field: "value" for F, "grad_norm", "steps", or "inner_grad_norm": see `bilevel.search.evaluations.Evaluation`.
        ax: the axes to draw on. None: new ones.

    Raises:
        TypeError: if the result has no history.
        ValueError: for another field, or a history without a finite number of it.
        ModuleNotFoundError: if matplotlib is not installed.

    >>> import numpy as np, bilevel as bl, bilevel.plot
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> found = bl.minimize(problem, np.zeros(2), fit=lambda hparams, _: hparams / 2)
    >>> bl.plot.history(found).get_ylabel()
    'outer objective F'
    """
    check_choice("field", field, list(LABELS))
    evaluations = getattr(result, "history", result)
    if not isinstance(evaluations, list | tuple) or not all(hasattr(e, "grad_norm") for e in evaluations):
        raise TypeError(
            f"history: expected a result of bl.minimize, or its history, got {type(result).__name__}. From an "
            "estimator of bilevel.sklearn, pass model.history_."
        )
    if not evaluations:
        raise ValueError("history: there is no evaluation.")
    numbers = np.array([getattr(evaluation, field) for evaluation in evaluations], float)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        raise ValueError(f"history: no evaluation has a finite {field!r}.")
    ax = axes(ax)
    from matplotlib.ticker import MaxNLocator

    index = np.arange(1, len(numbers) + 1)
    ax.plot(index, numbers, "o-", markersize=4)
    failed = np.array([evaluation.status != Status.CONVERGED for evaluation in evaluations])
    if failed.any():
        ax.plot(index[failed], numbers[failed], "x", color="C3", markersize=9, label="solve did not converge")
        ax.legend()
    if finite.min() > 0 and finite.max() >= DECADE * finite.min():
        ax.set_yscale("log")
    ax.set(xlabel="evaluation", ylabel=LABELS[field])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax
