"""Learn the magnitudes of random deformations of training images.

    python examples/paper/magnitudes.py --data DIR

Seven logarithms are tuned: of a rotation, translations, a size, shears and elastic displacements. The data, the network
and the loop are in augmentation.py. Hypergradients tune the magnitudes while a small network learns from few images.
Then there is a new training with the magnitudes that they have found. Metagradients, random search and Optuna need
several trainings. Without Optuna (`pip install optuna`), its variant is left out.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
import data
import runs
from augmentation import Parts, Sizes, evaluate, fit, penalized
from models import MAGNITUDES, MirrorWarp, Warp, small_cnn

NONE = (0.0,) * len(MAGNITUDES)
SCORES = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
LEAST, MOST = 0.01, 0.5  # random search draws magnitudes in between, evenly in their logarithms, and so does Optuna
STARTUP = 3  # random trials of Optuna
MIDDLE, FIRST = 0.07, 0.5  # where metagradients start, the middle of these logarithms, and their first step
EPS = 1e-3  # of Adam in the trainings that are differentiated: larger than usual, so that they are smoother
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
    trials: int = 8  # of random search, and of Optuna
    trainings: int = 3  # of metagradients; the last one is not differentiated


BY_HAND = (0.2, 0.1, 0.1, 0.1, 0.15, 0.15, 0.1)
TASKS = {
    "": Task(data.mnist, Warp, BY_HAND, FULL, ("none", "hand", *SOLVERS, "metagradient", "random", "optuna")),
    "mnist500-": Task(
        data.mnist, Warp, BY_HAND, replace(FULL, train=500), ("none", "hand", "identity", "cg", "random")
    ),
    "cifar10-": Task(
        data.cifar10,
        MirrorWarp,
        (0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.05),
        replace(FULL, train=1000, steps=1000, warmup=300),
        ("none", "hand", "identity", "cg", "random"),
        start=0.05,
        trials=5,
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
            task = task._replace(sizes=FAST, trials=2, trainings=2)
        split = task.load(arguments.data)
        settings = asdict(task.sizes) | {"data": split.name} | settings_of(variant, solver, task)
        for seed in arguments.seeds:
            job = partial(run, variant, solver, split, task, seed)
            try:
                histories[f"{name}-{seed}"] = runs.stored(
                    arguments, "magnitudes", f"{name}-{seed}", settings | {"seed": seed}, job
                )
            except OptunaMissingError as error:
                if arguments.only:
                    raise SystemExit(f"{name}-{seed}: {error}") from error
                print(f"{name}-{seed} is left out: {error}")
    runs.show(histories)
    return histories


def settings_of(variant: str, solver: Any, task: Task) -> dict[str, Any]:
    """Return the settings of one way to tune."""
    if variant in ("random", "optuna"):
        startup = {"startup": STARTUP} if variant == "optuna" else {}
        return {"trials": task.trials, "least": LEAST, "most": MOST} | startup
    if variant == "metagradient":
        return {"trainings": task.trainings, "start": MIDDLE, "first": FIRST, "eps": EPS}
    warm = {"warm": True} if variant in WARM else {}
    start = {"none": NONE, "hand": task.hand}.get(variant, (task.start,) * len(MAGNITUDES))
    return {"start": start, "solver": solver} | warm


def run(variant: str, solver: Any, split: data.Split, task: Task, seed: int, checkpoint: Path) -> dict[str, Any]:
    """Tune the magnitudes in one way, and train again with them."""
    torch.manual_seed(seed)
    parts = Parts.of(split, task.sizes)
    if variant == "random":
        return search(RandomDraws(), task, parts, checkpoint)
    if variant == "optuna":
        return search(TPE(seed), task, parts, checkpoint) | {"optuna": version("optuna")}
    if variant == "metagradient":
        return descend(task, parts, checkpoint)
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


class OptunaMissingError(ImportError):
    """Optuna is not installed."""


class RandomDraws:
    """Draw magnitudes evenly in their logarithms."""

    def ask(self) -> list[float]:
        return torch.empty(len(MAGNITUDES)).uniform_(math.log(LEAST), math.log(MOST)).exp().tolist()

    def tell(self, loss: float) -> None:
        """Ignore a validation loss."""


class TPE:
    """Let Optuna's tree-structured Parzen estimator choose magnitudes."""

    def __init__(self, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise OptunaMissingError("this variant needs Optuna. Run pip install optuna.") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed))

    def ask(self) -> list[float]:
        self.trial = self.study.ask()
        return [self.trial.suggest_float(name, LEAST, MOST, log=True) for name in MAGNITUDES]

    def tell(self, loss: float) -> None:
        self.study.tell(self.trial, loss)


def search(sampler: RandomDraws | TPE, task: Task, parts: Parts, checkpoint: Path) -> dict[str, Any]:
    """Train with the magnitudes of a sampler several times."""
    rows = []
    for _ in range(task.trials):
        began = time.process_time()
        magnitudes = sampler.ask()
        chose = time.process_time() - began
        history = train(magnitudes, None, task, parts, checkpoint)
        sampler.tell(history["result"]["val_loss"])
        rows.append(history["result"] | {"cpu_seconds": round(history["cpu_seconds"] + chose, 2)})
    return best_of(rows)


def descend(task: Task, parts: Parts, checkpoint: Path) -> dict[str, Any]:
    """Train several times. After a training, change each magnitude by the sign of its derivative, in halved steps."""
    augment = task.augment((MIDDLE,) * len(MAGNITUDES))
    rows = []
    for trial in range(task.trainings - 1):
        began = time.process_time()
        result = augment.numbers()
        model, derivative = differentiated(augment, parts, task.sizes)
        augment.logs.data -= FIRST / 2**trial * derivative.sign()
        seconds = time.process_time() - began
        for name, part in (("val", parts.val), ("test", parts.test)):
            result[f"{name}_loss"], result[f"{name}_accuracy"] = evaluate(model, *part)
        rows.append(result | {"cpu_seconds": round(seconds, 2), "derivative": derivative.tolist()})
    history = train(list(augment.numbers().values()), None, task, parts, checkpoint)
    return best_of([*rows, history["result"] | {"cpu_seconds": history["cpu_seconds"]}])


def differentiated(augment: Warp, parts: Parts, sizes: Sizes) -> tuple[torch.nn.Module, torch.Tensor]:
    """Train a network; return it, and the derivative of its validation loss by the logarithms of the magnitudes."""
    model = small_cnn(*parts.train.x.shape[1:3])

    def loss(model: Any, hparams: Any, batch: Any) -> torch.Tensor:
        chosen, noise = batch
        augmented = functional_call(augment, hparams, (parts.train.x[chosen], noise))
        return penalized(model(augmented), parts.train.y[chosen], dict(model.named_parameters()), sizes.decay)

    def outer(state: Any, hparams: Any) -> torch.Tensor:
        return step.evaluate(state, lambda model: cross_entropy(model(parts.val.x), parts.val.y))

    step = bilevel_torch.TrainingStep(model, torch.optim.Adam(model.parameters(), sizes.lr, eps=EPS), loss)
    orders = [torch.randperm(len(parts.train.y))[: sizes.batch] for _ in range(sizes.steps)]
    batches = [(chosen, augment.noise(len(chosen))) for chosen in orders]  # the noise is the same in each computation
    hg = bl.metagradient(bl.Training(step, outer), step.init(), dict(augment.named_parameters()), batches)
    step.load(hg.state)
    return model, hg.grad["logs"]


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the history of several trainings; the result is the training of the lowest validation loss."""
    best = min(rows, key=lambda row: row["val_loss"])
    return {
        "rows": [{"trial": trial} | row for trial, row in enumerate(rows)],
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 2),
        "result": {key: value for key, value in best.items() if key not in ("cpu_seconds", "derivative")},
    }


if __name__ == "__main__":
    main()
