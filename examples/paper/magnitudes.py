"""Learn the magnitudes of random deformations of training images.

    python examples/paper/magnitudes.py --data DIR

Seven logarithms are tuned while a small network learns from few images: of a rotation, translations, a size, shears and
elastic displacements. The data, the network and the loop are in augmentation.py. For each way to tune, there is also a
new training with the magnitudes that it has found.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
import data
import runs
from augmentation import Parts, Sizes, fit
from models import MAGNITUDES, Warp, small_cnn

NONE, HAND, START = (0.0,) * 7, (0.2, 0.1, 0.1, 0.1, 0.15, 0.15, 0.1), (0.018,) * 7
SCORES = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
LEAST, MOST = 0.01, 0.5  # random search draws magnitudes in between, evenly in their logarithms
SOLVERS = {
    "identity": "identity",
    "neumann": {"name": "neumann", "terms": 3, "damping": "auto"},
    "cg": {"name": "cg", "maxiter": 10, "damping": "auto"},
}
WARM = ("cg",)  # these keep their damping from batch to batch

TUNED = {"warmup": 0, "every": 5, "lr_augment": 0.1}  # chosen by runs with other seeds
FULL, FAST = Sizes(steps=600, **TUNED), Sizes(validation=300, steps=48, **TUNED)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the variants; return their histories."""
    arguments = runs.options(__doc__, argv, seeds=5)
    sizes, trials = (FAST, 2) if arguments.fast else (FULL, 8)
    split = data.mnist(arguments.data)
    histories = {}
    for variant, solver in runs.variants(arguments, {"none": None, "hand": None, **SOLVERS, "random": None}).items():
        settings = asdict(sizes) | {"data": split.name} | settings_of(variant, solver, trials)
        for seed in arguments.seeds:
            name, job = f"{variant}-{seed}", partial(run, variant, solver, split, sizes, trials, seed)
            histories[name] = runs.stored(arguments, "magnitudes", name, settings | {"seed": seed}, job)
    runs.show(histories)
    return histories


def settings_of(variant: str, solver: Any, trials: int) -> dict[str, Any]:
    """Return the settings of one way to tune."""
    if variant == "random":
        return {"trials": trials, "least": LEAST, "most": MOST}
    warm = {"warm": True} if variant in WARM else {}
    return {"start": {"none": NONE, "hand": HAND}.get(variant, START), "solver": solver} | warm


def run(
    variant: str, solver: Any, split: data.Split, sizes: Sizes, trials: int, seed: int, checkpoint: Path
) -> dict[str, Any]:
    """Tune the magnitudes in one way, and train again with them."""
    torch.manual_seed(seed)
    parts = Parts.of(split, sizes)
    if variant == "random":
        return search(trials, parts, sizes, checkpoint)
    start = settings_of(variant, solver, trials)["start"]
    tuned = train(start, bl.WarmStart(solver) if variant in WARM else solver, parts, sizes, checkpoint)
    if variant in ("none", "hand"):
        return tuned
    again = train([tuned["result"][name] for name in MAGNITUDES], None, parts, sizes, checkpoint)
    return tuned | {"result": tuned["result"] | {f"again_{key}": again["result"][key] for key in SCORES}}


def train(magnitudes: Sequence[float], solver: Any, parts: Parts, sizes: Sizes, checkpoint: Path) -> dict[str, Any]:
    """Train with magnitudes, which a solver may tune on the way."""
    model = small_cnn(*parts.train.x.shape[1:3])
    return fit(model, Warp(magnitudes), solver, parts, sizes, checkpoint)


def search(trials: int, parts: Parts, sizes: Sizes, checkpoint: Path) -> dict[str, Any]:
    """Train with random magnitudes several times; the result is the training of the lowest validation loss."""
    rows = []
    for trial in range(trials):
        magnitudes = torch.empty(len(MAGNITUDES)).uniform_(math.log(LEAST), math.log(MOST)).exp().tolist()
        history = train(magnitudes, None, parts, sizes, checkpoint)
        rows.append({"trial": trial, "cpu_seconds": history["cpu_seconds"]} | history["result"])
    best = min(rows, key=lambda row: row["val_loss"])
    result = {key: value for key, value in best.items() if key not in ("trial", "cpu_seconds")}
    return {"rows": rows, "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 2), "result": result}


if __name__ == "__main__":
    main()
