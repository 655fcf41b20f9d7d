"""A picture of the times of a run."""

from pathlib import Path
from typing import Any

from benchmarks.speed.report import FRAMEWORKS, HAND, METHODS, Record

COLUMNS = {  # what is drawn: colour and marker
    "ours": ("C0", "o"),
    "TorchOpt": ("C1", "s"),
    "Betty": ("C2", "^"),
    "higher": ("C3", "v"),
    "JAXopt": ("C4", "D"),
    "Lineax": ("C5", "P"),
    "Optimistix": ("C6", "X"),
}


def save(records: list[Record], path: Path) -> None:
    """Draw the times of our calls and of other libraries, divided by the times of the hand-written loop."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = {name: [r for r in records if r["kind"] == "times" and r["framework"] == name] for name in FRAMEWORKS}
    timed = {name: cells for name, cells in timed.items() if cells}
    figure = Figure(figsize=(10, 1.2 + 0.24 * max(map(len, timed.values()))), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (framework, cells) in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed.items(), strict=True):
        _draw(ax, cells)
        ax.set_title(FRAMEWORKS[framework])
    figure.savefig(path, dpi=110)


def _draw(ax: Any, cells: list[Record]) -> None:
    for name, (color, marker) in COLUMNS.items():
        points = [(cell["columns"][name]["ratio"][1], row) for row, cell in enumerate(cells) if _timed(cell, name)]
        if points:
            ax.plot(*zip(*points, strict=True), marker, color=color, label=name, markersize=5, alpha=0.8)
    ax.axvline(1, color="0.4", linewidth=1, label=HAND)
    ax.set_yticks(range(len(cells)), [f"{c['workload']}, {METHODS[c['method']]} {c['count']}" for c in cells])
    ax.tick_params(axis="y", labelsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks([0.25, 0.5, 1, 2, 3], ["0.25", "0.5", "1", "2", "3"])
    ax.minorticks_off()
    ax.set_xlabel("time, relative to the hand-written loop")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8)


def _timed(cell: Record, column: str) -> bool:
    return "ratio" in cell["columns"].get(column, {})
