"""The axes that a picture is drawn on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: Axes | None) -> Axes:
    """Return the axes, or new ones in a figure of their own. Raise ModuleNotFoundError if matplotlib is missing."""
    if ax is not None:
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
