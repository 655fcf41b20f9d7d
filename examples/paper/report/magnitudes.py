"""The learned magnitudes: what each way to tune them gains, and at what cost."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models import MAGNITUDES
from report.common import by_variant, draw
from report.magnitude_table import NAMES, REFERENCES, REPEATED, Runs, lines, results, shown

TARGETS = {"": 8, "mnist500-": None, "cifar10-": 3}  # of the mean gain, in points


def row(histories: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return title, the paper's figure and ours."""
    ours = []
    for prefix in TARGETS:
        runs = variants(histories, prefix)
        found = lines(runs)
        best = max((line for line in found if line.variant not in REFERENCES), key=lambda line: line.accuracies.mean())
        none, hand = (shown(line.accuracies) for line in found if line.variant in ("none", "hand"))
        ours.append(
            f"{images_of(runs).partition(' (')[0]}: test accuracy {shown(best.accuracies)} % by the best way "
            f"({best.name}), {none} % without, {hand} % chosen by hand"
        )
    return "Learned magnitudes", "not in the paper", ". ".join(ours)


def section(histories: dict[str, dict[str, Any]], pictures: Path) -> str:
    """Return the section."""
    few, more, photos = (variants(histories, prefix) for prefix in TARGETS)
    along, late, searched = (of[0]["settings"] for of in (few["identity"], photos["identity"], few["random"]))
    return f"""\
The U-Net above changes pixels freely, and gains nothing. Here, an augmentation has the magnitudes of seven random
deformations: {", ".join(MAGNITUDES)}. Their logarithms are tuned. The network trains as with the U-Net, but for
{along["steps"]} steps. It never trains on the {along["validation"]:,} validation images.

- *Identity, Neumann, CG*: hypergradients tune the magnitudes while the network trains. After every {along["every"]}
  steps, the magnitudes take a step of Adam ({along["lr_augment"]:g}) with a new batch of {along["batch_val"]}
  validation images. They start at {along["start"][0]:g}. Neumann's step and the damping are automatic. CG keeps its
  damping from batch to batch (`bl.WarmStart`).
- *Trained again*: a training from new weights with the magnitudes that the tuning ended with.
- *By hand*: {by_hand(few)}. These were the best of three choices on two other seeds.
- *Random search* draws each magnitude from {searched["least"]:g} to {searched["most"]:g}, evenly in its logarithm. It
  keeps the training of the lowest validation loss.
{other_searches(few)}
Runs with other seeds chose the settings. Gains are differences to no augmentation with the same seed and images,
in points. Costs are CPU times in trainings without tuning. A second training counts. The tables show means ± standard
deviations. The last columns subtract the accuracy that a search reaches at the same cost, in points. They show means ±
standard errors of the differences, and the number of seeds with a positive one.

**{images_of(few)}**, over {counts(few)}:

{results(few, TARGETS[""])}
{faults(few)}

**{images_of(more)}**, over {counts(more)}. The settings are the same:

{results(more, TARGETS["mnist500-"])}
**{images_of(photos)}**, over {counts(photos)}. A training has {late["steps"]:,} steps.
Beyond an edge lies the image again, mirrored. The magnitudes start at {late["start"][0]:g}, and stay there for
{late["warmup"]} steps. Otherwise they fall early, as above, and come back too late. In a run of the identity with
another seed, the gain was 3.9 points (trained again). It was 1.6 with a start at 0.018 and no wait. Chosen by hand:
{by_hand(photos)}. One run with another seed tried them. Magnitudes of colours are left out, since a brightness grew to
15 in a run of CG.

{results(photos, TARGETS["cifar10-"])}
{draw(pictures / "magnitudes.png", (10, 3.6), lambda figure: _fill(figure, few))}"""


def other_searches(runs: Runs) -> str:
    """Return how Optuna and metagradients search, if there are such runs."""
    words = ""
    if "optuna" in runs:
        settings = runs["optuna"][0]["settings"]
        words += f"""\
- *Optuna* {runs["optuna"][0]["optuna"]} does the same by its TPE sampler, after {settings["startup"]} random draws.
"""
    if "metagradient" in runs:
        found, settings = runs["metagradient"], runs["metagradient"][0]["settings"]
        first = np.array([100 * history["rows"][0]["test_accuracy"] for history in found])
        larger = np.mean([np.array(history["rows"][0]["derivative"]) < 0 for history in found])
        words += f"""\
- *Metagradients*: a step changes each logarithm by the sign of the derivative of the validation loss. This is the
  derivative through all steps of a training ([`bl.metagradient`](metagradients.md)). The first step has a size of
  {settings["first"]:g}, and each step is half as large as the one before. The last training is not differentiated. The
  training of the lowest validation loss is kept. The magnitudes start in the middle of random search's range, at
  {settings["start"]:g}. The trainings at this start have a test accuracy of {shown(first)} %. The derivatives are
  noisy: at the start, {larger:.0%} ask for larger magnitudes, and their mean cosine between two seeds is
  {agreement(found):.2f}. In the trainings that are differentiated, Adam has an eps of {settings["eps"]:g} instead of
  1e-8, which makes a run [smoother](metagradients.md#can-this-metagradient-be-trusted). An earlier form with steps of
  Adam and an eps of 1e-4 ran on these seeds too, and was about as good. So the seeds are not unseen.
"""
    return words


def agreement(of: list[dict[str, Any]]) -> float:
    """Return the mean cosine between the first metagradients of two seeds; 1 if there is one seed."""
    derivatives = np.array([history["rows"][0]["derivative"] for history in of])
    units = derivatives / np.linalg.norm(derivatives, axis=1, keepdims=True)
    cosines = (units @ units.T)[np.triu_indices(len(units), 1)]
    return float(cosines.mean()) if len(cosines) else 1.0


def faults(runs: Runs) -> str:
    """Return how the magnitudes move while a network trains."""
    along = [name for name in runs if name not in (*REFERENCES, *REPEATED)]
    early, late = (", ".join(f"{f(runs[name]):.0%} ({NAMES[name]})" for name in along) for f in (dip, wandering))
    return f"""\
Two things cost accuracy along a training. First, the magnitudes fall at the beginning. After a quarter of the training,
their geometric mean is {early} of the start. There is a likely reason, which was not tested: a hypergradient sees only
the present weights, and early deformations make training harder. Second, the magnitudes do not settle. In the second
half, the standard deviation of a magnitude is still {late}. The noise of the small batches may be a part of this."""


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


def images_of(runs: Runs) -> str:
    """Return the number of images to train on, and the data."""
    settings = runs["none"][0]["settings"]
    return f"{settings['train']:,} images of {settings['data']}"


def variants(histories: dict[str, dict[str, Any]], images: str = "") -> Runs:
    """Return the runs on some images by variant, in the order of NAMES."""
    found = by_variant(histories)
    return {name: found[images + name] for name in NAMES if images + name in found}


def by_hand(runs: Runs) -> str:
    """Return the magnitudes that were chosen by hand."""
    chosen = runs["hand"][0]["settings"]["start"]
    return ", ".join(f"{value:g} ({name})" for name, value in zip(MAGNITUDES, chosen, strict=True))


def _fill(figure: Figure, runs: Runs) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for i, of in enumerate(runs.values()):
        for key, mark in (("test_accuracy", "o"), ("again_test_accuracy", "x")):
            marked = [100 * history["result"][key] for history in of if key in history["result"]]
            left.plot(marked, [i] * len(marked), mark, color=f"C{i}")
    left.set(yticks=range(len(runs)), yticklabels=[NAMES[name] for name in runs], xlabel="test accuracy, %")
    left.set_title("A mark for each seed (cross: trained again)", fontsize=9)
    again = [line for line in lines(runs) if "again" in line.name]
    best = max(again, key=lambda line: line.accuracies.mean()).variant
    for i, name in enumerate(MAGNITUDES):
        steps = [row["step"] for row in runs[best][0]["rows"]]
        right.plot(steps, [row[name] for row in runs[best][0]["rows"]], f"C{i}", label=name)
    right.set(yscale="log", xlabel="step of training", ylabel="magnitude")
    right.set_title(f"{NAMES[best]}, seed 0", fontsize=9)
    right.legend(fontsize=7, ncols=2)
