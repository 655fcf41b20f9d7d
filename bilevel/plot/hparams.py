"""The largest and the smallest hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.backend import Backend
from bilevel.options import check_count
from bilevel.plot.axes import axes, check_names
from bilevel.validation import find_backend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def hparams(
    hparams: Any,
    *,
    count: int = 10,
    names: Sequence[str] | None = None,
    backend: Backend | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the largest and the smallest entries of hyperparameters as bars, with their names.

    Args:
        hparams: a tree of arrays of any backend.
        count: the number of entries on each side, >= 1. If there are at most 2 ``count`` entries, all are drawn.
        names: a name for each entry, in the order of the leaves and their entries. None: the path of the leaf and the
            index, such as ``['W1'][3, 5]``. Names are drawn as they are: a "$" is no formula.
        backend: as in `bilevel.hypergradient`.
        ax: the axes to draw on. None: new ones.

    Returns:
        The axes. The largest entry is at the top. A dashed line separates the two sides.

    Raises:
        TypeError, ValueError: for invalid arguments; the message names the argument.
        ModuleNotFoundError: if matplotlib is not installed.

    >>> import numpy as np, bilevel.plot
    >>> ax = bilevel.plot.hparams({"decay": np.array([0.1, 3.0, 0.2])}, count=1)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ["['decay'][1]", "['decay'][0]"]
    """
    check_count("count", count)
    found = find_backend(backend, hparams, hparams, ("hparams", "hparams"))
    arrays = {path: np.asarray(found.to_numpy(leaf), float) for path, leaf in found.leaves(hparams)}
    entries = np.concatenate([array.ravel() for array in arrays.values()])
    if names is not None:
        check_names(names, len(entries))
    if not len(entries):
        raise ValueError("hparams: there are no entries.")
    for bad in np.flatnonzero(~np.isfinite(entries))[:1].tolist():
        raise ValueError(f"{_name(arrays, bad)} is {entries[bad]}: no bar shows it.")
    order = np.argsort(-entries, kind="stable")
    split = len(entries) > 2 * count
    shown = np.concatenate([order[:count], order[-count:]]) if split else order
    texts = [_name(arrays, i) if names is None else str(names[i]) for i in shown.tolist()]

    ax = axes(ax)
    places = np.arange(len(shown))
    ax.barh(places, entries[shown], color=["C0" if entry >= 0 else "C1" for entry in entries[shown]])
    ax.set_yticks(places, texts, fontsize=8, parse_math=False)
    ax.invert_yaxis()
    if split:
        ax.axhline(count - 0.5, color="0.6", linestyle="--", linewidth=1)
        ax.set_title(f"the {count} largest and the {count} smallest of {len(entries):,}", fontsize=10)
    ax.set_xlabel("hyperparameter")
    return ax


def _name(arrays: dict[str, np.ndarray], entry: int) -> str:
    for path, array in arrays.items():
        if entry < array.size:
            index = ", ".join(str(i) for i in np.unravel_index(entry, array.shape))
            return f"{path}[{index}]" if index else path or "hparams"
        entry -= array.size
    raise IndexError(entry)
