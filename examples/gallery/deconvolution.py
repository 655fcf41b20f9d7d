"""Learn the regularizer of a deconvolution, filters and their weights, from eight pairs of images.

    python examples/gallery/deconvolution.py [--fast] [--figure FILE.png]

An image w is recovered from y = A w + noise, where A blurs, as the minimum of

    ½ ‖A w − y‖² + Σₖ exp(λₖ) Σ ρ(filterₖ ∗ w)   with   ρ(t) = √(t² + ε²)

`bl.minimize` tunes the filters and λ on the mean squared error of the recovered images (Kunisch & Pock, SIAM J. Imaging
Sciences 2013). With two filters of differences and one λ by grid search, this is total variation. With ρ(t) = ½ t², it
is Tikhonov's regularization. The images are scikit-learn's digits, enlarged to 16 x 16 pixels.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import conv2d

import bilevel as bl

TRAIN, TEST = 8, 100  # images
BLUR, NOISE, SMOOTHING = 1.2, 0.05, 1e-2  # standard deviations in pixels and in grey values; ε
GRID = np.linspace(-7.0, -1.0, 13)  # logarithms of weights
HParams = dict[str, Tensor]


def blur_kernel() -> Tensor:
    """Return a Gaussian of 9 x 9 pixels."""
    line = np.exp(-0.5 * (np.arange(-4, 5) / BLUR) ** 2)
    kernel = np.outer(line, line)
    return torch.as_tensor(kernel / kernel.sum())[None, None]


KERNEL = blur_kernel()


def blur(images: Tensor) -> Tensor:
    """Return A w. Beyond its border, an image is black."""
    return conv2d(images, KERNEL, padding=KERNEL.shape[-1] // 2)


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Return images of shape (n, 1, 16, 16) with grey values from 0 to 1, and what is observed of them."""
    rng = np.random.default_rng(seed)
    digits = load_digits().images[rng.permutation(1797)[: TRAIN + TEST]] / 16
    images = torch.as_tensor(ndimage.zoom(digits, (1, 2, 2), order=3).clip(0, 1))[:, None]
    return images, blur(images) + NOISE * torch.as_tensor(rng.standard_normal(images.shape))


def root(t: Tensor) -> Tensor:
    """Return √(t² + ε²), a smooth |t|."""
    return (t**2 + SMOOTHING**2).sqrt()


def square(t: Tensor) -> Tensor:
    """Return ½ t²."""
    return t**2 / 2


def problem_of(rho: Callable[[Tensor], Tensor]) -> bl.Problem:
    """Return the recovery of all images at once. The outer objective is their mean squared error."""

    def inner(w: Tensor, hparams: HParams, y: Tensor) -> Tensor:
        responses = rho(conv2d(w, hparams["filters"][:, None], padding=1)).sum((0, 2, 3))
        return (blur(w) - y).square().sum() / 2 + hparams["logs"].exp() @ responses

    def outer(w: Tensor, hparams: HParams, x: Tensor) -> Tensor:
        return (w - x).square().mean()

    return bl.Problem(inner, outer)


def differences() -> Tensor:
    """Return the filters of total variation: the differences to the right and lower neighbours."""
    filters = torch.zeros(2, 3, 3, dtype=torch.float64)
    filters[:, 1, 1] = -1
    filters[0, 1, 2] = filters[1, 2, 1] = 1
    return filters


def cosines() -> Tensor:
    """Return eight filters to start with: the discrete cosine transform of 3 x 3 pixels, without its mean."""
    i = np.arange(3)
    basis = np.cos(np.pi * (i + 0.5) * i[:, None] / 3)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    return torch.as_tensor(np.einsum("ai,bj->abij", basis, basis).reshape(9, 3, 3)[1:])


def recover(problem: bl.Problem, hparams: HParams, y: Tensor) -> Tensor:
    """Return the images that minimize the inner objective."""
    return bl.scipy_fit(problem, inner_args=(y,), gtol=1e-4)(hparams, y)


def decibels(w: Tensor, x: Tensor) -> float:
    """Return the mean over images of the peak signal-to-noise ratio."""
    return float((-10 * (w - x).square().mean((1, 2, 3)).log10()).mean())


def by_grid(problem: bl.Problem, filters: Tensor, x: Tensor, y: Tensor) -> HParams:
    """Return the shared weight of the filters that recovers the training images best."""
    options = [{"filters": filters, "logs": torch.full((len(filters),), log, dtype=x.dtype)} for log in GRID]
    return min(options, key=lambda hparams: float(problem.outer(recover(problem, hparams, y), hparams, x)))


def by_hypergradients(problem: bl.Problem, start: HParams, x: Tensor, y: Tensor, steps: int) -> HParams:
    """Tune filters and weights from a start."""
    fit = bl.scipy_fit(problem, inner_args=(y,), gtol=1e-4)
    return bl.minimize(problem, start, fit=fit, params0=y, inner_args=(y,), outer_args=(x,), maxiter=steps).x


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Tune in three ways, print a table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few iterations and test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="a file for the picture")
    options = parser.parse_args(argv)
    images, observed = pairs(options.seed)
    (x, x_test), (y, y_test) = images.split((TRAIN, TEST)), observed.split((TRAIN, TEST))
    if options.fast:
        x_test, y_test = x_test[:20], y_test[:20]

    smooth, squared = problem_of(root), problem_of(square)
    tuned: dict[str, tuple[bl.Problem, Callable[[], HParams]]] = {
        "Tikhonov, grid search": (squared, lambda: by_grid(squared, differences(), x, y)),
        "total variation, grid search": (smooth, lambda: by_grid(smooth, differences(), x, y)),
        "learned filters": (
            smooth,
            lambda: by_hypergradients(smooth, by_grid(smooth, cosines(), x, y), x, y, 5 if options.fast else 60),
        ),
    }
    found, shown = {}, {"image": x_test, "observed": y_test}
    print(f"{'':<32}{'training, dB':>14}{'test, dB':>12}{'seconds':>10}")
    for name, (problem, tune) in tuned.items():
        start = time.perf_counter()
        hparams = tune()
        seconds = time.perf_counter() - start
        shown[name] = recover(problem, hparams, y_test)
        scores = decibels(recover(problem, hparams, y), x), decibels(shown[name], x_test)
        found[name] = dict(zip(("training", "test", "seconds"), (*scores, seconds), strict=True))
        print(f"{name:<32}{scores[0]:>14.2f}{scores[1]:>12.2f}{seconds:>10.1f}")
    if options.figure:
        draw(shown, hparams["filters"], options.figure)
    return found


def draw(shown: dict[str, Tensor], filters: Tensor, path: Path) -> None:
    """Draw test images as they are, as observed and as recovered, and the filters."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.2, 1))
    axes = left.subplots(len(shown), 8)
    for line, (name, images) in zip(axes, shown.items(), strict=True):
        line[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    right.suptitle("learned filters", fontsize=9)
    largest = float(filters.abs().max())
    for ax, learned in zip(right.subplots(4, 2).flat, filters, strict=True):
        ax.imshow(learned.numpy(), cmap="coolwarm", vmin=-largest, vmax=largest)
        ax.set_axis_off()
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
