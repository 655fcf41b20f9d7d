"""Means and spreads over seeds, tables and figures."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def by_variant(histories: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the histories of all seeds by variant; files are called variant-seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, history in histories.items():
        found.setdefault(name.rpartition("-")[0], []).append(history)
    return found


def mean(histories: Iterable[dict[str, Any]], key: str) -> float:
    """Return the mean over seeds of a result."""
    return float(np.mean([history["result"][key] for history in histories]))


def spread(histories: Iterable[dict[str, Any]], key: str, form: str = ".3f") -> str:
    """Return mean ± standard deviation over seeds of a result; the number alone if there is one."""
    values = [history["result"][key] for history in histories]
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(np.std(values, ddof=1), form)}"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(path: Path, size: tuple[float, float], fill: Callable[[Figure], None]) -> str:
    """Write a figure as a PNG file; return the Markdown that shows it in docs/paper.md."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"![{path.stem}](paper/{path.name})\n"
