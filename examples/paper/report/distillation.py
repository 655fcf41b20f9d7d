"""Distilling a data set: what the images are worth, how they look, and whether PyTorch and JAX agree."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from report.common import by_variant, draw, mean, spread, table

SOLVERS = {"identity": "identity", "neumann-5": "Neumann 5", "neumann-20": "Neumann 20", "cg-10": "CG 10, damped"}
METHODS = {
    **SOLVERS,
    "jax-cg-10": "the same in JAX",
    "class-means": "mean of each class",
    "random-images": "a random image of each class",
    "all-data": "all training images",
}
ROWS = {
    **{f"mnist-{method}": name for method, name in METHODS.items()},
    **{f"lagging-{method}": f"{name}, lagging" for method, name in SOLVERS.items()},
    **{f"cifar-{method}": f"CIFAR-10: {name}" for method, name in METHODS.items()},
}
Runs = dict[str, list[dict[str, Any]]]


def row(histories: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return title, the paper's result, and ours."""
    runs = by_variant(histories)
    best = max(SOLVERS, key=lambda method: _refitted(runs, f"mnist-{method}"))
    return (
        "Distilling a data set",
        "pictures of one image per class; no accuracy is known to us",
        f"ten images of {runs[f'mnist-{best}'][0]['result']['hparams']:,} pixels in all teach "
        f"{_refitted(runs, f'mnist-{best}'):.1%} on the test images ({SOLVERS[best]}), "
        f"ten random ones {_refitted(runs, 'mnist-random-images'):.1%}, all {_refitted(runs, 'mnist-all-data'):.1%}",
    )


def section(histories: dict[str, dict[str, Any]], pictures: Path) -> str:
    """Return the section; draw the images."""
    runs = by_variant(histories)
    mnist, cifar, lagging = (runs[name][0] for name in ("mnist-identity", "cifar-cg-10", "lagging-identity"))
    setup, names = mnist["settings"], {"all-data": f"{mnist['settings']['validation']:,} training images"}
    head = ("images from", "along with them", "from scratch", "along, lagging", "from scratch, lagging")
    rows = [
        ({**METHODS, **names}[method], *_pair(runs, f"mnist-{method}"), *_pair(runs, f"lagging-{method}"))
        for method in METHODS
        if f"mnist-{method}" in runs
    ]
    colour = [(METHODS[method], *_pair(runs, f"cifar-{method}")) for method in METHODS if f"cifar-{method}" in runs]
    shown = [name for name in ROWS if "images" in runs.get(name, [{}])[0]]
    picture = draw(pictures / "distillation.png", (8.5, 0.72 * len(shown)), lambda figure: _images(figure, runs, shown))
    jax = [history["result"] for history in runs["mnist-jax-cg-10"]]
    return f"""\
Section 5.3 and figure 6 of the paper. A logistic regression learns from ten images, one for each class. They start at
zero, and their pixels are tuned on the loss of {setup["validation"]:,} real images. There are {setup["inner_steps"]}
steps of Adam on the regression for each of the {setup["steps"]:,} steps of Adam on the images. The data are
{setup["data"]}, with {mnist["result"]["hparams"]:,} hyperparameters. The table has two test accuracies. The first
regression was trained along with the images. The second was trained on the final images, from scratch to its minimum:

{table(head, rows)}
The same for {cifar["settings"]["data"]}, {cifar["result"]["hparams"]:,} hyperparameters:

{table(head[:3], colour)}
{picture}
With a learning rate of {setup["lr"]:g}, the regression follows the images closely. There, the best solver with
products is {_best(runs, "mnist")}. From scratch, it is {_ahead(runs, "mnist")} the identity. With a learning rate of
{lagging["settings"]["lr"]:g}, the regression lags behind (the paper's code has 1e-4). There, the best solver is
{_best(runs, "lagging")}, {_ahead(runs, "lagging")} the identity. The two accuracies differ by up to {_gap(runs):.1f}
points. So the accuracy along with the images does not tell what the final images are worth alone. All trainings have
the same weight decay, also on real images. It is tuned for none of them.

The losses are written once, for arrays of both frameworks. {len(jax)} runs in JAX compare their last hypergradient with
PyTorch's at the same point. They differ by at most {max(r["difference_from_torch"] for r in jax):.0e} of their norm, in
float32. Whole runs end at a validation loss of {spread(runs["mnist-jax-cg-10"], "val_loss", ".4f")} in JAX, and
{spread(runs["mnist-cg-10"], "val_loss", ".4f")} in PyTorch. In JAX, {sum(r["unsolved"] for r in jax)} of
{len(jax) * setup["steps"]:,} systems were not solved to the tolerance.

Scaled down: the paper's code takes 10,000 steps, with the identity as its solver. The paper also has CIFAR-100
(second-hand). The picture shows seed 0, and stretches the brightness of distilled images.
"""


def _pair(runs: Runs, name: str) -> tuple[str, str]:
    """Return the accuracies of weights trained along and of those trained from scratch, where there are any."""
    keys = ("test_accuracy", "refitted_accuracy")
    return tuple(spread(runs[name], key) if name in runs and key in runs[name][0]["result"] else "" for key in keys)


def _refitted(runs: Runs, name: str) -> float:
    return mean(runs[name], "refitted_accuracy")


def _top(runs: Runs, task: str) -> str:
    return max((m for m in SOLVERS if m != "identity"), key=lambda method: _refitted(runs, f"{task}-{method}"))


def _best(runs: Runs, task: str) -> str:
    return SOLVERS[_top(runs, task)]


def _ahead(runs: Runs, task: str) -> str:
    points = 100 * (_refitted(runs, f"{task}-{_top(runs, task)}") - _refitted(runs, f"{task}-identity"))
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _gap(runs: Runs) -> float:
    """Return the largest difference of the two accuracies in one run, in points."""
    results = [run["result"] for found in runs.values() for run in found if "test_accuracy" in run["result"]]
    return 100 * max(abs(result["test_accuracy"] - result["refitted_accuracy"]) for result in results)


def _unpack(packed: dict[str, Any], stretch: bool) -> np.ndarray:
    """Return images with their channels last, from 0 to 1."""
    levels = np.frombuffer(base64.b64decode(packed["levels"]), np.uint8).reshape(packed["shape"])
    pixels = (levels / 127.5 - 1) * packed["scale"]
    if stretch:
        pixels = 0.5 + pixels / (2 * np.quantile(np.abs(pixels), 0.98))
    return np.moveaxis(pixels.clip(0, 1), 1, -1)


def _images(figure: Any, runs: Runs, shown: list[str]) -> None:
    axes = figure.subplots(len(shown), 10, squeeze=False)
    for line, name in zip(axes, shown, strict=True):
        images = _unpack(runs[name][0]["images"], stretch="rows" in runs[name][0])
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(ROWS[name], rotation=0, ha="right", va="center", fontsize=9)
