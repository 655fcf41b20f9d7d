"""Distil a data set into one image per class: the pixels are the hyperparameters of a logistic regression.

    python examples/paper/distillation.py --data DIR

Section 5.3 and figure 6 of the paper, which shows the images; here what they are worth, too: the test accuracy of the
regression that was trained along, and of one that is trained on the final images from scratch. Both losses are written
once, with the operators and functions that PyTorch and JAX have in common; the loop for JAX is in distillation_jax.py.
"""

import base64
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import bilevel as bl
import data
import runs
from bilevel import scipy_fit
from loop import Loop

CG = {"name": "cg", "maxiter": 10, "rtol": 0.1, "damping": 0.02}  # damped, so that ten steps are enough
SOLVERS = {
    "identity": "identity",
    "neumann-5": {"name": "neumann", "terms": 5},
    "neumann-20": {"name": "neumann", "terms": 20},
    "cg-10": CG,
}
CONTROLS = {"class-means": None, "random-images": None, "all-data": None}
METHODS = {**SOLVERS, "jax-cg-10": CG, **CONTROLS}
DECAY = math.exp(-4)
LABELS = np.eye(10, dtype=np.float32)  # of the distilled images


class Task(NamedTuple):
    """What to distil, how, and the learning rates of the regression and of the images."""

    load: Callable[[Path | None], data.Split]
    lr: float
    outer_lr: float
    methods: tuple[str, ...]


TASKS = {
    "mnist": Task(data.mnist, 1e-2, 1e-2, tuple(METHODS)),
    "lagging": Task(data.mnist, 1e-3, 1e-2, tuple(SOLVERS)),  # too slow to follow the images, as in the paper's code
    "cifar": Task(data.cifar10, 1e-3, 1e-3, ("cg-10", *CONTROLS)),
}


@dataclass(frozen=True)
class Setup:
    """What the runs of a task have in common."""

    steps: int  # of the images
    validation: int
    every: int = 25  # steps to a row
    inner_steps: int = 5  # of training, for each of the images
    lr: float = 1e-2
    outer_lr: float = 1e-2


FULL, FAST = Setup(steps=750, validation=8000), Setup(steps=50, validation=600)


def problem(xp: Any) -> bl.Problem:
    """Return logistic regression on distilled images, judged on real ones, in the functions of ``torch`` or ``jnp``."""

    def cross_entropy(weights: Any, x: Any, targets: Any) -> Any:
        logits = x @ weights["kernel"] + weights["bias"]
        logits = logits - xp.amax(logits, 1)[:, None]
        return (xp.log(xp.exp(logits).sum(1)) - (logits * targets).sum(1)).mean()

    def inner(weights: Any, images: Any, targets: Any) -> Any:
        return cross_entropy(weights, images, targets) + DECAY * (weights["kernel"] ** 2).sum()

    def outer(weights: Any, images: Any, x: Any, targets: Any) -> Any:
        return cross_entropy(weights, x, targets)

    return bl.Problem(inner, outer)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Distil each data set by each method; return the histories."""
    arguments = runs.options(__doc__, argv)
    histories = {}
    for name, task in TASKS.items():
        setup, split = FAST if arguments.fast else FULL, task.load(arguments.data)
        setup = replace(setup, lr=task.lr, outer_lr=task.outer_lr)
        for (method, solver), seed in product(runs.variants(arguments, METHODS).items(), arguments.seeds):
            if method in (*task.methods, "config"):
                settings = {**asdict(setup), "data": split.name, "solver": solver, "seed": seed}
                variant, job = f"{name}-{method}-{seed}", partial(run, method, solver, setup, seed, split)
                histories[variant] = runs.stored(arguments, "distillation", variant, settings, job)
    runs.show(histories)
    return histories


def run(method: str, solver: Any, setup: Setup, seed: int, split: data.Split, checkpoint: Path) -> dict[str, Any]:
    """Make ten images, or take them, and return what a regression learns from them."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(split.train.y))[: setup.validation]
    real = split.train.x[chosen].reshape(len(chosen), -1), LABELS[split.train.y[chosen]]
    test = split.test.x.reshape(len(split.test.y), -1), LABELS[split.test.y]
    kernel = 0.01 * rng.standard_normal((real[0].shape[1], 10))
    start = {"kernel": kernel.astype(np.float32), "bias": np.zeros(10, np.float32)}
    if method in CONTROLS:
        history, (images, targets) = {"result": {}}, control(method, *real)
    else:
        history, images = distil(method, solver, setup, start, real, test, checkpoint)
        targets = LABELS
    history["result"]["refitted_accuracy"] = accuracy(refit(images, targets, start), test)
    if seed == 0 and len(images) == 10:
        history["images"] = pack(images.reshape(10, *split.test.x.shape[1:]))
    return history


def distil(
    method: str, solver: Any, setup: Setup, start: Any, real: Any, test: Any, checkpoint: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the history and the images."""
    if method.startswith("jax"):
        import distillation_jax

        return distillation_jax.distil(problem, solver, setup, start, LABELS, real, partial(accuracy, images=test))
    losses, labels, real = problem(torch), torch.as_tensor(LABELS), tuple(map(torch.as_tensor, real))
    weights = {name: torch.tensor(w, requires_grad=True) for name, w in start.items()}
    values = {name: w.detach() for name, w in weights.items()}  # as they are at any time
    images = torch.zeros(10, real[0].shape[1], requires_grad=True)  # hyperparameters
    optimizer = torch.optim.Adam(weights.values(), lr=setup.lr)
    outer_optimizer = torch.optim.Adam([images], lr=setup.outer_lr)

    state = {**weights, "images": images, "optimizer": optimizer, "outer": outer_optimizer}
    loop = Loop(checkpoint, setup.steps, state, about=checkpoint.stem)
    for step in loop:
        for _ in range(setup.inner_steps):
            optimizer.zero_grad()
            losses.inner(weights, images, labels).backward(inputs=list(weights.values()))
            optimizer.step()
        hg = bl.hypergradient(losses, weights, images, inner_args=(labels,), outer_args=real, solver=solver)
        images.grad = hg.grad
        outer_optimizer.step()
        if (step + 1) % setup.every == 0:
            loop.row(step=step + 1, val_loss=float(hg.value), test_accuracy=accuracy(values, test))
    return loop.history(hparams=images.numel(), **loop.rows[-1]), images.detach().numpy()


def control(method: str, x: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images to compare with: of each class the mean or a random one, or all of them."""
    if method == "all-data":
        return x, targets
    classes = [x[targets[:, label] == 1] for label in range(10)]
    pick = (lambda images: images.mean(0)) if method == "class-means" else (lambda images: images[0])
    return np.stack([pick(images) for images in classes]), LABELS


def refit(images: np.ndarray, targets: np.ndarray, start: Any) -> dict[str, torch.Tensor]:
    """Train on some images from scratch, to the minimum, which float32 does not always reach."""
    double = partial(torch.tensor, dtype=torch.float64)
    fit = scipy_fit(problem(torch), inner_args=(double(targets),), gtol=1e-5)
    return fit(double(images), {name: double(w) for name, w in start.items()})


def accuracy(weights: Any, images: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the share of images that are classified rightly."""
    kernel, bias = np.asarray(weights["kernel"]), np.asarray(weights["bias"])
    return float(((images[0] @ kernel + bias).argmax(1) == images[1].argmax(1)).mean())


def pack(images: np.ndarray) -> dict[str, Any]:
    """Return images as text, in 256 levels from -scale to scale."""
    scale = float(np.abs(images).max())
    levels = np.round((images / scale + 1) * 127.5).astype(np.uint8)
    return {"scale": scale, "shape": list(images.shape), "levels": base64.b64encode(levels.tobytes()).decode()}


if __name__ == "__main__":
    main()
