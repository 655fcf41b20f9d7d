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
{settings["data"]} has {settings["train"]:,} training examples, {settings["wrong"]:.0%} of them with a wrong label, and
{settings["validation"]:,} examples with right labels for validation. A softmax regression trains while the weights of
the examples are tuned. In another variant, a network maps an image and its label to the weight. There are
{settings["steps"]} hypergradients, with {settings["inner_steps"]} steps of Adam on all examples before each. Each solve
starts from the last solution. Then a model is trained from scratch with the weights, and tested. AUC is the probability
that a right label has more weight than a wrong one. The numbers are means ± standard deviations over
{len(runs["cg"])} seed(s).

{table(head, rows)}
{draw(pictures / "reweighting.png", (11, 3.4), lambda figure: _fill(figure, runs))}
{_comparison(runs)}

On other images, {settings["wrong"]:.0%} of them with wrong labels, the network has an AUC of
{spread(runs["network"], "auc_unseen")}. Weights per example cannot judge other images. We know of no result of the
paper to compare with. In the paper's code, a network sees only the image, and has a softmax over the batch. Our network
also sees the label, since a wrong label cannot be found without it. It ends in a sigmoid.
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
        f"{len(above_all)} of the {len(tuned)} kinds of tuned weights have a higher test accuracy than equal weights. "
        f"{len(above_validation)} have a higher one than a model that trains on the validation set alone. The weights "
        f"by CG regain {regained:.0%} of the loss by wrong labels.\n\n"
    )
    if best_auc != fitted:
        words += (
            f"'{NAMES[fitted]}' has the lowest validation loss, and '{NAMES[best_auc]}' has the highest AUC. So many "
            "weights can lower the validation loss in other ways than by finding wrong labels."
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
