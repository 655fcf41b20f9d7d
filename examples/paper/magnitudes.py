"""Learn the magnitudes of random deformations of training images.

    python examples/paper/magnitudes.py --data DIR

Seven logarithms are tuned while a small network learns from few images: of a rotation, translations, a size, shears and
elastic displacements. The data, the network and the loop are in augmentation.py. For each way to tune, there is also a
new training with the magnitudes that it has found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bilevel as bl
import data
import runs
from augmentation import Parts, Sizes, fit
from models import MAGNITUDES, MirrorWarp, Warp, small_cnn

NONE = (0.0,) * len(MAGNITUDES)
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


class Task(NamedTuple):
    """Images to learn from, and the ways to tune the magnitudes."""

    load: Callable[[Path | None], data.Split]
    augment: type[Warp]
    hand: tuple[float, ...]  # the magnitudes that are chosen by hand
    sizes: Sizes
    variants: tuple[str, ...]
    start: float = 0.018  # of each magnitude that is tuned
    trials: int = 8  # of random search
    seeds: int | None = None  # at most; None: all that are asked for


TASKS = {
    "": Task(data.mnist, Warp, (0.2, 0.1, 0.1, 0.1, 0.15, 0.15, 0.1), FULL, ("none", "hand", *SOLVERS, "random")),
    "cifar10-": Task(
        data.cifar10,
        MirrorWarp,
        (0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.05),
        replace(FULL, train=1000, steps=1000, warmup=300),
        ("none", "hand", "identity", "cg", "random"),
        start=0.05,
        trials=5,
        seeds=3,
    ),
}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the variants; return their histories."""
    arguments = runs.options(__doc__, argv, seeds=5)
    names = {f"{prefix}{variant}": (prefix, variant) for prefix, task in TASKS.items() for variant in task.variants}
    chosen = runs.variants(arguments, {name: SOLVERS.get(variant) for name, (_, variant) in names.items()})
    histories = {}
    for name, solver in chosen.items():
        prefix, variant = names.get(name, ("", name))
        task = TASKS[prefix]
        if arguments.fast:
            task = task._replace(sizes=FAST, trials=2)
        split = task.load(arguments.data)
        settings = asdict(task.sizes) | {"data": split.name} | settings_of(variant, solver, task)
        for seed in arguments.seeds[: task.seeds]:
            job = partial(run, variant, solver, split, task, seed)
            histories[f"{name}-{seed}"] = runs.stored(
                arguments, "magnitudes", f"{name}-{seed}", settings | {"seed": seed}, job
            )
    runs.show(histories)
    return histories


def settings_of(variant: str, solver: Any, task: Task) -> dict[str, Any]:
    """Return the settings of one way to tune."""
    if variant == "random":
        return {"trials": task.trials, "least": LEAST, "most": MOST}
    warm = {"warm": True} if variant in WARM else {}
    start = {"none": NONE, "hand": task.hand}.get(variant, (task.start,) * len(MAGNITUDES))
    return {"start": start, "solver": solver} | warm


def run(variant: str, solver: Any, split: data.Split, task: Task, seed: int, checkpoint: Path) -> dict[str, Any]:
    """Tune the magnitudes in one way, and train again with them."""
    torch.manual_seed(seed)
    parts = Parts.of(split, task.sizes)
    if variant == "random":
        return search(task, parts, checkpoint)
    start = settings_of(variant, solver, task)["start"]
    tuned = train(start, bl.WarmStart(solver) if variant in WARM else solver, task, parts, checkpoint)
    if variant in ("none", "hand"):
        return tuned
    again = train([tuned["result"][name] for name in MAGNITUDES], None, task, parts, checkpoint)
    return tuned | {"result": tuned["result"] | {f"again_{key}": again["result"][key] for key in SCORES}}


def train(magnitudes: Sequence[float], solver: Any, task: Task, parts: Parts, checkpoint: Path) -> dict[str, Any]:
    """Train with magnitudes, which a solver may tune on the way."""
    model = small_cnn(*parts.train.x.shape[1:3])
    return fit(model, task.augment(magnitudes), solver, parts, task.sizes, checkpoint)


def search(task: Task, parts: Parts, checkpoint: Path) -> dict[str, Any]:
    """Train with random magnitudes several times; the result is the training of the lowest validation loss."""
    rows = []
    for trial in range(task.trials):
        magnitudes = torch.empty(len(MAGNITUDES)).uniform_(math.log(LEAST), math.log(MOST)).exp().tolist()
        history = train(magnitudes, None, task, parts, checkpoint)
        rows.append({"trial": trial, "cpu_seconds": history["cpu_seconds"]} | history["result"])
    best = min(rows, key=lambda row: row["val_loss"])
    result = {key: value for key, value in best.items() if key not in ("trial", "cpu_seconds")}
    return {"rows": rows, "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 2), "result": result}


if __name__ == "__main__":
    main()
