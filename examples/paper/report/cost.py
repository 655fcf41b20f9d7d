"""The cost of hypergradients and of joint training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.common import by_variant, draw, table
from runs import RESULTS

TITLE = "Cost"
TIME, MEMORY = "joint / training, time", "joint / training, memory"
CONTROLS = ("none", "untuned")  # what systems call the run that tunes nothing, behind the network's name if it has one


def row(histories: dict[str, Any]) -> tuple[str, str, str]:
    """Return the title, what the paper says, and what came out."""
    few = histories["neumann-3"]["result"]
    return (
        TITLE,
        'joint tuning "only a few times more costly in memory and compute than standard training" (abstract)',
        f"with {few['hyperparameters']:,} hyperparameters and 3 Neumann terms {few[TIME]:.1f} times the time and "
        f"{few[MEMORY]:.1f} times the memory",
    )


def section(histories: dict[str, Any], pictures: Path) -> str:
    """Return the table and the picture."""
    results = {name: history["result"] for name, history in histories.items()}
    products = {k: results[f"neumann-{k}"] for k in (1, 3, 5, 20)}
    slope, start = np.polyfit(list(products), [r["gradients"] for r in products.values()], 1)
    lines = [
        (name.replace("-", " "), f"{r['gradients']:.1f}", f"{r[TIME]:.2f}", f"{r[MEMORY]:.2f}")
        for name, r in sorted(results.items(), key=lambda item: item[1]["gradients"])
    ]
    sizes = histories["neumann-3"]["settings"]
    flat = products[20][MEMORY] / products[1][MEMORY]
    assert abs(flat - 1) < 0.1  # what is said below
    text = (
        f"Each of the {products[3]['hyperparameters']:,} weights of an MLP has a decay. The MLP has two layers of "
        f"{sizes['hidden']:,} units, and batches have {sizes['batch']} examples. A hypergradient with K Neumann terms "
        f"takes {start:.1f} + {slope:.2f} K training gradients (fitted to K = 1, 3, 5, 20). Its memory with K = 20 is "
        f"{flat:.2f} times its memory with K = 1. Joint training is Algorithm 1, with five training steps of Adam for "
        "each step of the hyperparameters. Its time and memory are divided by those five steps alone. Memory is "
        "counted above a process that has loaded model and data. `unrolled T` differentiates through T further "
        "steps.\n\n"
    )
    text += table(["method", "training gradients", "joint / training, time", "joint / training, memory"], lines)
    text += "\n" + _systems() + "\n" + draw(pictures / "cost.png", (9, 3.6), lambda figure: _fill(figure, results))
    return text


def _systems() -> str:
    """Return the table of what tuning took in the other systems of this folder."""
    lines = []
    for folder in sorted(RESULTS.iterdir()):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        seconds = {
            name: np.mean([history["cpu_seconds"] for history in found])
            for name, found in by_variant(files).items()
            if all("cpu_seconds" in history for history in found)
        }
        for control in [name for name in seconds if name.endswith(CONTROLS)]:
            network = control.rpartition("-")[0]
            lines += [
                (folder.name.replace("_", " "), name, f"{spent / seconds[control]:.1f}")
                for name, spent in seconds.items()
                if name != control and name.rpartition("-")[0] == network
            ]
    if not lines:
        return ""
    return (
        "The next table is about whole runs of the other systems. It has their processor time, divided by the time of "
        "a run without tuning:\n\n" + table(["system", "variant", "time / no tuning"], lines)
    )


def _fill(figure: Figure, results: dict[str, Any]) -> None:
    time, memory = figure.subplots(1, 2)
    for axes, key, label in (
        (time, "gradients", "training gradients"),
        (memory, MEMORY, "memory of joint over plain training"),
    ):
        for family, color, marker in (("neumann", "C0", "o"), ("unrolled", "C3", "s")):
            found = {int(n.split("-")[1]): r[key] for n, r in results.items() if n.startswith(family)}
            if family == "neumann":
                found[0] = results["identity"][key]
            found = dict(sorted(found.items()))
            axes.plot(found.keys(), found.values(), color=color, marker=marker, label=family)
        axes.set_xlabel("products K, or unrolled steps T")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
