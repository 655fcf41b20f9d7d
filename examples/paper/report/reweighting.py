"""Weights of training examples: how well they tell right labels from wrong ones, and what they are worth."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.common import by_variant, draw, mean, spread, table

NAMES = {
    "all": "all labels, equal weights",
    "validation": "the validation set alone",
    "identity": "weights, identity",
    "neumann": "weights, 10 Neumann terms",
    "cg": "weights, 10 steps of CG",
    "network": "network, 10 steps of CG",
    "config": "weights, solver of --config",
    "clean": "the right labels alone",
}
TUNED = ("identity", "neumann", "cg", "network", "config")


def row(histories: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return title, the paper's figure and ours."""
    runs = by_variant(histories)
    tuned, equal, clean = (spread(runs[name], "test_accuracy") for name in ("cg", "all", "clean"))
    ours = f"test accuracy {tuned}; {equal} without weights, {clean} with the right labels alone"
    return "Weights of training examples", "no figure known to us; a network for it is in the published code", ours


def section(histories: dict[str, dict[str, Any]], pictures: Path) -> str:
    """Return the section."""
    runs = {name: by_variant(histories)[name] for name in NAMES if name in by_variant(histories)}
    settings = runs["cg"][0]["settings"]
    head = ["trained on", "λ", "AUC", "weight of right", "of wrong", "test loss", "test accuracy"]
    rows = []
    for name, of in runs.items():
        tuned = name in TUNED
        weights = [spread(of, key) if tuned else "" for key in ("auc", "weight_right", "weight_wrong")]
        count = f"{of[0]['result']['hparams']:,}" if tuned else ""
        rows.append([NAMES[name], count, *weights, spread(of, "test_loss"), spread(of, "test_accuracy")])
    return f"""\
{settings["data"]}: {settings["train"]:,} training examples, {settings["wrong"]:.0%} of them with a wrong label, and
{settings["validation"]:,} clean ones for validation. A softmax regression is trained while the weights of the examples,
or a network from an image and its label to a weight, are tuned: {settings["steps"]} hypergradients, and
{settings["inner_steps"]} steps of Adam on all examples before each; a solve starts from the last one's solution. Then a
model is trained from scratch with the weights, and tested. AUC is the chance that a right label weighs more than a
wrong one. Means ± standard deviations over {len(runs["cg"])} seed(s).

{table(head, rows)}
{draw(pictures / "reweighting.png", (11, 3.4), lambda figure: _fill(figure, runs))}
{_comparison(runs)}

On images that it was not tuned with, {settings["wrong"]:.0%} of them with wrong labels again, the network has an AUC of
{spread(runs["network"], "auc_unseen")}; weights per example say nothing of those. We know of no result of the paper's
to compare with. Its code has a network that sees the image alone and weighs by a softmax over the batch; ours sees the
label too, without which nobody could tell that it is wrong, and ends in a sigmoid.
"""


def _comparison(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Say what the numbers show, in words that follow from them."""
    accuracy = {name: mean(of, "test_accuracy") for name, of in runs.items()}
    tuned = [name for name in TUNED if name in runs]
    above_all = [NAMES[name] for name in tuned if accuracy[name] > accuracy["all"]]
    above_validation = [NAMES[name] for name in tuned if accuracy[name] > accuracy["validation"]]
    best_auc = max(tuned, key=lambda name: mean(runs[name], "auc"))
    fitted = min(tuned, key=lambda name: mean(runs[name], "val_loss"))
    regained = (accuracy["cg"] - accuracy["all"]) / (accuracy["clean"] - accuracy["all"])
    words = (
        f"{len(above_all)} of the {len(tuned)} kinds of tuned weights beat equal weights, {len(above_validation)} beat "
        "a model of the validation set alone, the control that uses as much of the truth. The weights by CG regain "
        f"{regained:.0%} of the accuracy that the wrong labels cost. "
    )
    if best_auc != fitted:
        words += (
            f"The lowest validation loss ({NAMES[fitted]}) and the highest AUC ({NAMES[best_auc]}) are not the same "
            "solver's: so many weights can serve the validation set in other ways than by finding wrong labels."
        )
    return words.strip()


def _fill(figure: Figure, runs: dict[str, list[dict[str, Any]]]) -> None:
    curves, counts, bars = figure.subplots(1, 3)
    for name in TUNED:
        for history in runs.get(name, [])[:1]:
            rows = history["rows"]
            curves.plot([r["step"] for r in rows], [r["auc"] for r in rows], label=NAMES[name])
    curves.set(title="Telling labels apart (seed 0)", xlabel="step of the weights", ylabel="AUC")
    curves.legend(fontsize=7)
    edges = np.linspace(0, 1, 21)
    for part, values in runs["cg"][0]["histogram"].items():
        counts.stairs(values, edges, fill=True, alpha=0.6, label=f"{part} labels")
    counts.set(title="Tuned weights, CG (seed 0)", xlabel="weight", ylabel="examples")
    counts.legend(fontsize=7)
    names = list(runs)[::-1]
    colours = ["C0" if name in TUNED else "0.6" for name in names]
    bars.barh([NAMES[name] for name in names], [mean(runs[name], "test_accuracy") for name in names], color=colours)
    lowest = min(mean(of, "test_accuracy") for of in runs.values())
    bars.set(title="Trained from scratch", xlabel="test accuracy", xlim=(lowest - 0.05, None))
    bars.tick_params(axis="y", labelsize=7)
