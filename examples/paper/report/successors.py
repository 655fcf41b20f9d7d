"""What came after the paper, on logistic regression."""

from pathlib import Path
from typing import Any

import numpy as np

from report.common import by_variant, draw, mean, spread, table

Histories = dict[str, dict[str, Any]]
LABELS = {
    "reference": "L-BFGS, exact",
    "hoag": "HOAG (`bl.minimize`, CG)",
    "cg": "CG, warm start",
    "gauss-newton": "CG on Gauss-Newton, warm start",
    "amigo": "AmIGO (10 products, warm start)",
    "soba": "SOBA (1 product, warm start)",
    "nystrom": "Nyström (rank 60)",
    "identity": "identity (T1-T2)",
    "f2sa": "F2SA (gradients alone)",
}


def row(histories: Histories) -> tuple[str, str, str]:
    """Return the title, the paper's figure and ours."""
    groups = _groups(histories)
    gaps = {name: np.mean(_gaps(groups, name)) for name in groups if name != "reference"}
    best, worst = min(gaps, key=gaps.__getitem__), max(gaps, key=gaps.__getitem__)
    return (
        "Successors of the paper",
        "not in the paper",
        f"validation loss above the reference: from {gaps[best]:.0e} ({best}) to {gaps[worst]:.0e} ({worst})",
    )


def section(histories: Histories, pictures: Path) -> str:
    """Return the section."""
    groups = _groups(histories)
    settings = groups["reference"][0]["settings"]
    lines = [
        [
            LABELS[name],
            spread(group, "cosine", ".4f"),
            spread(group, "error", ".3f"),
            f"{np.mean(_gaps(groups, name)):.1e}",
            spread(group, "test loss", ".4f"),
            spread(group, "CPU seconds", ".1f"),
        ]
        for name, group in groups.items()
    ]
    head = ["method", "cosine", "relative error", "validation loss above the reference", "test loss", "CPU seconds"]
    seeds, costs = len(groups["reference"]), _mean(groups, "CPU seconds")
    (low, high), (inner, _) = settings["bounds"], groups["cg"][0]["settings"]["method"]
    loops = [name for name in groups if name not in ("reference", "hoag")]
    nearest = max(loops, key=_mean(groups, "cosine").get)
    closest, lowest = (min(loops, key=_mean(groups, key).get) for key in ("error", "validation loss"))
    quickest, least = min(loops, key=costs.get), min(np.mean(_gaps(groups, name)) for name in loops)
    assert all(_mean(groups, "cosine")[name] < _mean(groups, "cosine")["hoag"] for name in loops)
    apart = abs(_mean(groups, "cosine")["cg"] - _mean(groups, "cosine")["gauss-newton"])
    assert apart < 0.05  # of two runs that differ in rounding, and where CG stops
    return f"""\
This section compares methods that came after the paper. A logistic regression on {settings["data"]} has a log penalty
for each feature. They start at {settings["start"]:g}, and stay between {low:g} and {high:g}. Two thirds of the examples
are for training, and one third is for validation.

- *Reference*: L-BFGS with exact hypergradients at exact optima.
- *HOAG*: L-BFGS, with CG whose tolerance falls.
- *The others* alternate {settings["steps"]} times: {inner} steps of gradient descent on all examples (SOBA: one), then
  one step of Adam on the penalties. So each method's hypergradient is in one deterministic loop. Stochastic steps, the
  methods' step sizes and variance reduction are left out.

*Cosine* and *relative error* compare the last hypergradient with the exact one at the optimum for the same penalties.
Losses are at that optimum. The numbers are means ± standard deviations over {seeds} splits. CPU seconds do not include
the comparison.

{table(head, lines)}
{draw(pictures / "successors.png", (9, 3.6), lambda figure: _fill(figure, groups))}
Among the loops, these are the best at the end:

- the greatest cosine: {LABELS[nearest]}
- the smallest error: {LABELS[closest]}
- the lowest validation loss: {LABELS[lowest]}
- the least time: {LABELS[quickest]}

HOAG solves each inner problem, and no loop has its cosine. The loops leave the inner problem unsolved, which costs all
of them accuracy, also CG. They end {least:.0e} or more above the reference, which stops after {settings["iterations"]}
iterations. Logistic regression is a linear model, so the Gauss-Newton matrix is its Hessian. The cosines of the two CG
loops differ by {apart:.0e}. CG on Gauss-Newton runs in PyTorch on dense data. All others run in NumPy on sparse data.
"""


def _groups(histories: Histories) -> dict[str, list[dict[str, Any]]]:
    found = by_variant(histories)
    return {name: found[name] for name in LABELS}


def _mean(groups: dict[str, list[dict[str, Any]]], key: str) -> dict[str, float]:
    return {name: mean(group, key) for name, group in groups.items()}


def _gaps(groups: dict[str, list[dict[str, Any]]], name: str) -> list[float]:
    """Return by how much the validation loss ends above the reference's, by seed."""
    pairs = zip(groups[name], groups["reference"], strict=True)
    return [ours["result"]["validation loss"] - best["result"]["validation loss"] for ours, best in pairs]


def _fill(figure: Any, groups: dict[str, list[dict[str, Any]]]) -> None:
    left, right = figure.subplots(1, 2)
    best = min(row["validation loss"] for history in (g[0] for g in groups.values()) for row in history["rows"])
    for name, group in groups.items():
        rows = group[0]["rows"]  # of the first split
        seconds = [row["CPU seconds"] for row in rows]
        style = "k--" if name == "reference" else "-"
        left.loglog(seconds, [max(r["validation loss"] - best, 1e-7) for r in rows], style, marker=".", label=name)
        right.semilogx(seconds, [row["cosine"] for row in rows], style, marker=".", label=name)
    left.set(xlabel="CPU seconds", ylabel="validation loss above the best")
    right.set(xlabel="CPU seconds", ylabel="cosine to the exact hypergradient")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
