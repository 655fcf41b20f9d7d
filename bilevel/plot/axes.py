"""The axes that a picture is drawn on, and names in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: Any) -> Axes:
    """Return the axes, or new ones in a figure of their own.

    Raise a TypeError if they are no axes, and ModuleNotFoundError if matplotlib is missing.
    """
    if ax is not None:
        if not hasattr(ax, "plot") or not hasattr(ax, "transAxes"):  # pyplot also has a function plot
            raise TypeError(f"ax: expected axes of matplotlib, such as plt.subplots()[1], got {type(ax).__name__}.")
        return ax
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "Pictures need matplotlib, which is not installed: pip install matplotlib.", name="matplotlib"
        ) from error
    return plt.subplots(layout="constrained")[1]


def check_names(names: Any, count: int) -> None:
    """Raise a TypeError or ValueError unless there is a list of so many names."""
    if isinstance(names, str | Mapping) or not (hasattr(names, "__len__") and hasattr(names, "__getitem__")):
        raise TypeError(f"names: expected a list of {count} names, got {type(names).__name__}.")
    if len(names) != count:
        raise ValueError(f"names: expected {count}, one for each number, got {len(names)}.")
