"""Length scales of a Gaussian process by cross-validation, for targets of which some are grossly wrong.

    python examples/gallery/kernel.py [--fast] [--figure FILE.png]

The target is Friedman's first function: it depends on five of ten features. A length scale per feature, and the noise,
minimize the Huber loss of held-out rows in five folds (`bl.problems.k_fold`). scikit-learn's GaussianProcessRegressor
maximizes the marginal likelihood, which assumes Gaussian noise. Its grid search has one length scale for all features.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold
from torch import Tensor
from torch.nn.functional import huber_loss

import bilevel as bl

FEATURES, FOLDS, CENTERS, NOISE = 10, 5, 80, 0.5
HParams = dict[str, Tensor]


def make(rows: int, wrong: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features and targets, to train on and to test, with a part of the training targets off by about 10."""
    rng = np.random.default_rng(seed)
    x, y = make_friedman1(rows + 1000, n_features=FEATURES, random_state=seed)
    y -= y.mean()
    y[:rows] += NOISE * rng.standard_normal(rows) + 10 * rng.standard_normal(rows) * (rng.random(rows) < wrong)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return x[:rows], y[:rows], x[rows:], y[rows:]


class Process:
    """A Gaussian process with its mean in the span of some centers, as a linear model of features.

    The features Φ have Φ Φᵀ = K(x, c) K(c, c)⁻¹ K(c, x): with all rows as centers, this is the kernel.
    """

    def __init__(self, centers: Tensor) -> None:
        self.centers = centers

    def features(self, hparams: HParams, x: Tensor) -> Tensor:
        """Return Φ of shape (n, centers), times the size of the process in units of the noise."""
        scales = hparams["scales"].exp()
        between = kernel(self.centers / scales, self.centers / scales)
        root = torch.linalg.cholesky(between + 1e-6 * torch.eye(len(between), dtype=x.dtype))
        features = torch.linalg.solve_triangular(root, kernel(self.centers / scales, x / scales), upper=False).T
        return hparams["size"].exp() * features

    def predict(self, w: Tensor, hparams: HParams, x: Tensor) -> Tensor:
        """Return the mean of the process."""
        return self.features(hparams, x) @ w

    def inner(self, w: Tensor, hparams: HParams, x: Tensor, y: Tensor) -> Tensor:
        return huber_loss(self.predict(w, hparams, x), y, reduction="sum") + w @ w / 2

    def outer(self, w: Tensor, hparams: HParams, x: Tensor, y: Tensor) -> Tensor:
        return huber_loss(self.predict(w, hparams, x), y)

    def fit(self, hparams: HParams, w: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        """Minimize the inner objective by reweighted least squares."""
        features = self.features(hparams, x)
        w, eye = torch.zeros(len(self.centers), dtype=x.dtype) if w is None else w, torch.eye(len(self.centers))
        for _ in range(1000):
            weights = 1 / (features @ w - y).abs().clamp(min=1)
            last, w = w, torch.linalg.solve(features.T * weights @ features + eye, features.T @ (weights * y))
            if (w - last).norm() <= 1e-8 * w.norm():
                break
        return w


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(−½ ‖a − b‖²) for all pairs of rows."""
    return torch.exp(-(a[:, None] - b).square().sum(2) / 2)


def by_cross_validation(x: Tensor, y: Tensor, steps: int) -> tuple[Process, Tensor, HParams]:
    """Tune all hyperparameters by hypergradients; return the model, its weights from all rows, and them."""
    process = Process(x[:CENTERS])
    cv = bl.problems.k_fold(
        bl.Problem(process.inner, process.outer), KFold(FOLDS, shuffle=True, random_state=0).split(x)
    )
    start = {"scales": torch.zeros(FEATURES, dtype=x.dtype), "size": torch.ones((), dtype=x.dtype)}
    fit = cv.fit_each(process.fit, (x, y))
    found = bl.minimize(
        cv,
        start,
        fit=fit,
        inner_args=(x, y),
        outer_args=(x, y),
        solver=bl.CG(rtol=1e-2, maxiter=400),
        bounds=(-3, 4),
        maxiter=steps,
    )
    return process, process.fit(found.x, None, x, y), found.x


def by_marginal_likelihood(x: np.ndarray, y: np.ndarray) -> GaussianProcessRegressor:
    """Tune a length scale per feature, the size and the noise with scikit-learn."""
    prior = ConstantKernel() * RBF(np.ones(FEATURES), (1e-2, 1e3)) + WhiteKernel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # length scales of useless features reach their bounds
        return GaussianProcessRegressor(prior, normalize_y=True, n_restarts_optimizer=1, random_state=0).fit(x, y)


def by_grid(x: np.ndarray, y: np.ndarray) -> GridSearchCV:
    """Tune one length scale and the penalty of kernel ridge regression by the absolute error of held-out rows."""
    grid = {"gamma": np.geomspace(0.01, 10, 10), "alpha": np.geomspace(1e-3, 10, 9)}
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    return GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=folds, scoring="neg_mean_absolute_error").fit(x, y)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Tune in three ways, without and with wrong targets; print a table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few rows and iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="a file for the picture")
    options = parser.parse_args(argv)
    rows, steps = (150, 5) if options.fast else (200, 25)

    found, scales = {}, {}
    print(f"{'root mean squared error, test':<46}{'error':>8}{'seconds':>10}")
    for wrong in (0.0, 0.1):
        x, y, x_test, y_test = make(rows, wrong, options.seed)

        def report(name: str, began: float, predicted: Any, wrong: float = wrong, y_test: Tensor = y_test) -> None:
            name += f", {wrong:.0%} wrong"
            error = float((torch.as_tensor(predicted) - y_test).square().mean().sqrt())
            found[name] = {"error": error, "seconds": time.perf_counter() - began}
            print(f"{name:<46}{error:>8.3f}{found[name]['seconds']:>10.1f}")

        began = time.perf_counter()
        report("one scale, grid search", began, by_grid(x.numpy(), y.numpy()).predict(x_test.numpy()))
        began = time.perf_counter()
        likely = by_marginal_likelihood(x.numpy(), y.numpy())
        report("scale per feature, likelihood", began, likely.predict(x_test.numpy()))
        began = time.perf_counter()
        process, w, hparams = by_cross_validation(x, y, steps)
        report("scale per feature, hypergradients", began, process.predict(w, hparams, x_test))
        scales[wrong] = likely.kernel_.k1.k2.length_scale, hparams["scales"].exp().numpy()
    if options.figure:
        draw(scales, options.figure)
    return found


def draw(scales: dict[float, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw the inverse length scales, which tell how much a feature counts."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    places = np.arange(FEATURES)
    for ax, (wrong, both) in zip(figure.subplots(1, len(scales), sharey=True), scales.items(), strict=True):
        for i, (name, found) in enumerate(zip(("marginal likelihood", "hypergradients"), both, strict=True)):
            ax.bar(places + 0.4 * i - 0.2, 1 / found, 0.4, label=name)
        ax.set(title=f"{wrong:.0%} wrong targets", xlabel="feature (the first five matter)", xticks=places)
    figure.axes[0].set_ylabel("1 / length scale")
    figure.axes[0].legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
