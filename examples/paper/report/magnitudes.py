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
AGAIN = "again_test_accuracy"
HEAD = ["magnitudes", "test accuracy, %", "gain", "trained again, %", "gain", "validation loss", "CPU seconds"]
Runs = dict[str, list[dict[str, Any]]]


def row(histories: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return title, the paper's figure and ours."""
    runs, photos = variants(histories), variants(histories, "cifar10-")
    best = max(learned(runs), key=lambda name: mean(runs[name], "again_test_accuracy"))
    ours = f"{NAMES[best]}: test accuracy {accuracy(runs[best], 'again_test_accuracy')} %, trained again; "
    ours += f"{accuracy(runs['none'])} % without, {accuracy(runs['hand'])} % chosen by hand. On CIFAR-10: "
    best = max(learned(photos), key=lambda name: mean(photos[name], AGAIN))
    ours += f"{accuracy(photos[best], AGAIN)} % ({NAMES[best]}, trained again) and {accuracy(photos['none'])} % without"
    return "Learned magnitudes", "not in the paper", ours


def section(histories: dict[str, dict[str, Any]], pictures: Path) -> str:
    """Return the section."""
    runs = variants(histories)
    tuned, searched = runs[learned(runs)[0]][0]["settings"], runs["random"][0]["settings"]
    return f"""\
The U-Net above changes pixels freely, and gains nothing. Here, an augmentation has the magnitudes of seven random
deformations: {", ".join(MAGNITUDES)}. They start at {tuned["start"][0]:g}.
Their logarithms are tuned while the same network trains. After every {tuned["every"]} steps of training, they take a
step of Adam ({tuned["lr_augment"]:g}) with a new batch of {tuned["batch_val"]} validation images. Neumann's step and
the damping are automatic. CG keeps its damping from batch to batch (`bl.WarmStart`). The network trains as with the
U-Net, but for {tuned["steps"]} steps. Short runs with another seed chose these settings.

- *Chosen by hand*: {by_hand(runs)}. These were the best of three choices on two other seeds.
- *Random search* draws each magnitude from {searched["least"]:g} to {searched["most"]:g}, evenly in its logarithm. It
  trains with {searched["trials"]} draws, and keeps the training of the lowest validation loss.
- *Trained again*: a training from new weights with the magnitudes that the tuning ended with.
- *Gains* are differences to no augmentation with the same seed and images, in points.

The network never trains on the {tuned["validation"]:,} validation images, only the magnitudes do.
{tuned["train"]} images of {tuned["data"]}, means ± standard deviations over {counts(runs)}:

{results(runs)}
The next table compares with random search in the same CPU time, over the seeds that both have. If there is a second
training, its time counts:

{comparison(runs)}
{largest(runs, 8)}

{faults(runs)}

{with_photos(variants(histories, "cifar10-"))}

{draw(pictures / "magnitudes.png", (10, 3.6), lambda figure: _fill(figure, runs))}"""


def largest(runs: Runs, target: int) -> str:
    """Return which gains are above a target, and which is the largest, in words that follow from the numbers."""
    none = runs["none"]
    along, again = (
        "; ".join(NAMES[name] for name in learned(runs) if min(gains(runs[name], none, key)) > target) or "none"
        for key in ("test_accuracy", AGAIN)
    )
    best = max(learned(runs), key=lambda name: np.mean(gains(runs[name], none, AGAIN)))
    return f"""\
Gains of more than {target} points with every seed, along the training: {along}. Trained again: {again}.
The largest mean gain of a second training is {np.mean(gains(runs[best], none, AGAIN)):.1f} points, by {NAMES[best]}."""


def faults(runs: Runs) -> str:
    """Return how the magnitudes move."""
    early, late = (
        ", ".join(f"{f(runs[name]):.0%} ({NAMES[name]})" for name in learned(runs)) for f in (dip, wandering)
    )
    return f"""\
Two things cost accuracy. First, the magnitudes fall at the beginning. After a quarter of the training, their geometric
mean is {early} of the start. There is a likely reason, which was not tested: a hypergradient sees only the present
weights, and early deformations make training harder. Second, the magnitudes do not settle. In the second half, the
standard deviation of a magnitude is still {late}. The noise of the small batches may be a part of this."""


def with_photos(photos: Runs) -> str:
    """Return what comes out of photographs."""
    settings, start = photos["none"][0]["settings"], photos[learned(photos)[0]][0]["settings"]["start"][0]
    return f"""\
**Photographs.** The same with {settings["train"]:,} images of {settings["data"]}, and {settings["steps"]:,} steps, over
{counts(photos)}. Beyond an edge lies the image again, mirrored. The magnitudes start at {start:g}, and stay there for
{settings["warmup"]} steps. Otherwise they fall early, as above, and come back too late. In a run of the identity with
another seed, the gain was 3.9 points (trained again). It was 1.6 with a start at 0.018 and no wait. Chosen by hand:
{by_hand(photos)}. One run with another seed tried them. Magnitudes of colours are left out, since a brightness
grew to 15 in a run of CG.

{results(photos)}
{comparison(photos)}
{largest(photos, 3)}"""


def results(runs: Runs) -> str:
    """Return the table of accuracies."""
    return table(HEAD, [cells(name, of, runs["none"]) for name, of in runs.items()])


def log_magnitudes(history: dict[str, Any]) -> np.ndarray:
    """Return the logarithms of the magnitudes along a run, of shape (rows, magnitudes)."""
    return np.log([[row[name] for name in MAGNITUDES] for row in history["rows"]])


def dip(of: list[dict[str, Any]]) -> float:
    """Return the geometric mean of the magnitudes after a quarter of the run, relative to the start."""
    logs = [log_magnitudes(history) for history in of]
    return float(np.exp(np.mean([at[len(at) // 4 - 1] for at in logs]))) / of[0]["settings"]["start"][0]


def wandering(of: list[dict[str, Any]]) -> float:
    """Return the relative standard deviation of a magnitude in the second half of a run, on average."""
    logs = [log_magnitudes(history) for history in of]
    return math.expm1(float(np.mean([at[len(at) // 2 :].std(0) for at in logs])))


def counts(runs: Runs) -> str:
    """Return the number of seeds, and the variants that have fewer."""
    fewer = [f"{NAMES[name]} over {len(of)}" for name, of in runs.items() if len(of) < len(runs["none"])]
    return f"{len(runs['none'])} seeds" + (f" ({', '.join(fewer)})" if fewer else "")


def variants(histories: dict[str, dict[str, Any]], images: str = "") -> Runs:
    """Return the runs on some images by variant, in the order of NAMES."""
    found = by_variant(histories)
    return {name: found[images + name] for name in NAMES if images + name in found}


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
    """Return a table: each tuned run next to random search in its CPU time."""
    none, hand = runs["none"], np.mean(gains(runs["hand"], runs["none"]))
    training = float(np.mean([history["cpu_seconds"] for history in none]))
    rows = []
    for name in learned(runs):
        for key, extra, how in (("test_accuracy", 0.0, ""), ("again_test_accuracy", training, ", trained again")):
            found = gains(runs[name], none, key)
            pairs = zip(runs["random"], runs[name], strict=False)  # one may have fewer seeds
            searches = [search_of(search, history["cpu_seconds"] + extra) for search, history in pairs]
            ahead = [a - b for a, b in zip(found, gains(searches, none), strict=False)]
            counts = f"{sum(a > 0 for a in ahead)} of {len(ahead)}"
            trials = _range([search["trials"] for search in searches])
            rows.append(
                [NAMES[name] + how, f"{np.mean(found) / hand:.0%}", trials, accuracy(searches), _spread(ahead), counts]
            )
    head = ["tuned by", "share of the gain by hand", "trainings of random search in the same CPU time"]
    return table([*head, "their best", "difference, points", "seeds ahead"], rows)


def by_hand(runs: Runs) -> str:
    """Return the magnitudes that were chosen by hand."""
    chosen = runs["hand"][0]["settings"]["start"]
    return ", ".join(f"{value:g} ({name})" for name, value in zip(MAGNITUDES, chosen, strict=True))


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
