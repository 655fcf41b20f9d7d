"""The learned magnitudes: what each way to tune them gains, and at what cost."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models import MAGNITUDES
from report.common import by_variant, draw, mean, spread, table

NAMES = {
    "none": "none",
    "hand": "chosen by hand",
    "random": "random search",
    "identity": "identity",
    "neumann": "3 Neumann terms",
    "cg": "CG, 10 steps",
    "config": "solver of --config",
}
Runs = dict[str, list[dict[str, Any]]]


def row(histories: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return title, the paper's figure and ours."""
    runs = variants(histories)
    best = max(learned(runs), key=lambda name: mean(runs[name], "again_test_accuracy"))
    ours = f"{NAMES[best]}: test accuracy {accuracy(runs[best], 'again_test_accuracy')} %, trained again; "
    ours += f"{accuracy(runs['none'])} % without, {accuracy(runs['hand'])} % chosen by hand"
    return "Learned magnitudes", "not in the paper", ours


def section(histories: dict[str, dict[str, Any]], pictures: Path) -> str:
    """Return the section."""
    runs = variants(histories)
    tuned, searched = runs[learned(runs)[0]][0]["settings"], runs["random"][0]["settings"]
    hand = ", ".join(
        f"{value:g} ({name})" for name, value in zip(MAGNITUDES, runs["hand"][0]["settings"]["start"], strict=True)
    )
    head = ["magnitudes", "test accuracy", "gain", "trained again", "gain", "validation loss", "CPU seconds"]
    lines = [cells(name, of, runs["none"]) for name, of in runs.items()]
    return f"""\
The U-Net above changes pixels as it likes, and gains nothing. Here, an augmentation has seven magnitudes of random
deformations: {", ".join(MAGNITUDES)}. They start at {tuned["start"][0]:g}, and their logarithms are tuned while the
same network trains, by a step of Adam ({tuned["lr_augment"]:g}) after every {tuned["every"]} steps of training, with a
new batch of {tuned["batch_val"]} validation images. Neumann's step and both dampings are automatic. The training is
that of the U-Net, except that it takes {tuned["steps"]} steps. These settings were chosen by runs with other seeds.

- *Chosen by hand*: {hand}. The same runs compared it with smaller magnitudes.
- *Random search* draws each magnitude from {searched["least"]:g} to {searched["most"]:g}, evenly in its logarithm,
  trains with it, and keeps the training of the lowest validation loss.
- *Trained again*: a training with new first weights and the magnitudes that were found.
- Gains are differences to no augmentation with the same seed and images, in points. The network has never seen
  validation images: only the magnitudes have. Training on them would help more, as there are
  {tuned["validation"]:,}; they are a yardstick here, not a saving.

{tuned["train"]} images of {tuned["data"]}, means ± standard deviations over {counts(runs)}:

{table(head, lines)}
{comparison(runs)}

{draw(pictures / "magnitudes.png", (10, 3.6), lambda figure: _fill(figure, runs))}"""


def counts(runs: Runs) -> str:
    """Return the number of seeds, and the variants that have fewer."""
    fewer = [f"{NAMES[name]} over {len(of)}" for name, of in runs.items() if len(of) < len(runs["none"])]
    return f"{len(runs['none'])} seeds" + (f" ({', '.join(fewer)})" if fewer else "")


def variants(histories: dict[str, dict[str, Any]]) -> Runs:
    """Return the runs by variant, in the order of NAMES."""
    found = by_variant(histories)
    return {name: found[name] for name in NAMES if name in found}


def learned(runs: Runs) -> list[str]:
    """Return the variants that are tuned by hypergradients."""
    return [name for name in runs if name not in ("none", "hand", "random")]


def accuracy(of: list[dict[str, Any]], key: str = "test_accuracy") -> str:
    """Return mean ± standard deviation of an accuracy in per cent."""
    return _spread([100 * history["result"][key] for history in of])


def gains(of: list[dict[str, Any]], none: list[dict[str, Any]], key: str = "test_accuracy") -> list[float]:
    """Return the difference to no augmentation of each seed, in points."""
    return [100 * (a["result"][key] - b["result"]["test_accuracy"]) for a, b in zip(of, none, strict=False)]


def cells(variant: str, of: list[dict[str, Any]], none: list[dict[str, Any]]) -> list[str]:
    """Return a line of the table."""
    seconds = f"{np.mean([history['cpu_seconds'] for history in of]):.0f}"
    along = [accuracy(of), "" if variant == "none" else _spread(gains(of, none))]
    again = ["", ""]
    if variant not in ("none", "hand", "random"):
        again = [accuracy(of, "again_test_accuracy"), _spread(gains(of, none, "again_test_accuracy"))]
    name = f"{NAMES[variant]}, {len(of[0]['rows'])} trainings" if variant == "random" else NAMES[variant]
    return [name, *along, *again, spread(of, "val_loss"), seconds]


def search_of(history: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the best trial of a random search that has had at least so many seconds, or all its trials."""
    rows = history["rows"]
    trials = max(1, math.ceil(seconds / np.mean([row["cpu_seconds"] for row in rows])))
    return {"result": min(rows[:trials], key=lambda row: row["val_loss"]), "trials": min(trials, len(rows))}


def comparison(runs: Runs) -> str:
    """Return what the numbers show, in words that follow from them."""
    none, hand = runs["none"], np.mean(gains(runs["hand"], runs["none"]))
    training = float(np.mean([history["cpu_seconds"] for history in none]))
    said = []
    for name in learned(runs):
        of = runs[name]
        words = f"- **{NAMES[name]}** has"
        for key, extra, how in (("test_accuracy", 0.0, "along"), ("again_test_accuracy", training, "trained again")):
            found = gains(of, none, key)
            searches = [search_of(a, b["cpu_seconds"] + extra) for a, b in zip(runs["random"], of, strict=False)]
            ahead = [a - b for a, b in zip(found, gains(searches, none), strict=False)]
            words += (
                f" {np.mean(found) / hand:.0%} of the gain of the hand-chosen magnitudes {how}. Random search in the "
                f"same CPU time ({_range([s['trials'] for s in searches])} trainings) is at "
                f"{accuracy(searches)} %: the difference is {_spread(ahead)} points, and positive for "
                f"{sum(a > 0 for a in ahead)} of {len(ahead)} seeds."
            )
        said.append(words.replace("seeds. ", "seeds. It has ", 1))
    return "\n".join(said)


def _spread(values: Sequence[float]) -> str:
    return spread([{"result": {"": value}} for value in values], "", ".1f")


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _fill(figure: Figure, runs: Runs) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for i, (name, of) in enumerate(runs.items()):
        left.plot([100 * h["result"]["test_accuracy"] for h in of], [i] * len(of), "o", color=f"C{i}")
        if name in learned(runs):
            left.plot([100 * h["result"]["again_test_accuracy"] for h in of], [i] * len(of), "x", color=f"C{i}")
    left.set(yticks=range(len(runs)), yticklabels=[NAMES[name] for name in runs], xlabel="test accuracy, %")
    left.set_title("A mark for each seed (cross: trained again)", fontsize=9)
    best = max(learned(runs), key=lambda name: mean(runs[name], "again_test_accuracy"))
    for i, name in enumerate(MAGNITUDES):
        steps = [row["step"] for row in runs[best][0]["rows"]]
        right.plot(steps, [row[name] for row in runs[best][0]["rows"]], f"C{i}", label=name)
    right.set(yscale="log", xlabel="step of training", ylabel="magnitude")
    right.set_title(f"{NAMES[best]}, seed 0", fontsize=9)
    right.legend(fontsize=7, ncols=2)
