"""The linear datamodeling score: how well hypergradients predict losses after retraining without examples."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from benchmarks.attribution.methods import solved
from benchmarks.attribution.networks import Digits, digits, losses
from benchmarks.attribution.points import network, point, spectral
from benchmarks.attribution.runs import Training, retrain, through_run

LEFT_OUT = 0.05
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def queries(name: str, data: Digits, count: int) -> Callable[[Array], Array]:
    """Return the losses of the first images as a function of the weights of the network."""
    x, y = jnp.asarray(data.x[:count]), jnp.asarray(data.y[:count])
    return lambda w: losses(network(name).logits(w, x), y)


def left_out(runs: int, examples: int, seed: int) -> np.ndarray:
    """Return weights of the examples for each run, of shape (runs, examples): 1, and 0 for the part `LEFT_OUT`."""
    rng, weights = np.random.default_rng(seed), np.ones((runs, examples))
    for row in weights:
        row[rng.choice(examples, int(LEFT_OUT * examples), replace=False)] = 0
    return weights


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's correlation of two sequences."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def score(gradients: np.ndarray, weights: np.ndarray, actual: np.ndarray) -> float:
    """Return the mean over queries of Spearman's correlation between predicted and actual losses (Park et al., 2023).

    Args:
        gradients: hypergradients, of shape (queries, examples).
        weights: of the retrainings, of shape (runs, examples).
        actual: losses after the retrainings, of shape (runs, queries).
    """
    predicted = (weights - 1) @ gradients.T
    return float(np.mean([spearman(a, b) for a, b in zip(predicted.T, actual.T, strict=True)]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean cosine of the rows of a and b."""
    products = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(products.mean())


def compare(
    name: str, training: Training, *, runs: int = 60, count: int = 20, examples: int = 600
) -> dict[str, object]:
    """Return the score, the cosine to the derivative of the run, and the products of each method."""
    data, held_out = digits(examples)
    objectives = queries(name, held_out, count)
    truth = through_run(network(name), training, data, objectives)
    weights = left_out(runs, examples, training.seed)
    actual = retrain(network(name), training, data, objectives, weights)
    at = point(name, data, truth.w, objectives)
    bases = spectral(at, at.hessian), spectral(at, at.gauss_newton)
    rows = {}
    for method, gradients, products in solved(*bases, training, DAMPINGS):
        rows[method] = [score(gradients, weights, actual), cosine(gradients, truth.gradients), products]
    whole = {"the whole run": [score(truth.gradients, weights, actual), 1.0, float("nan")]}
    return {"network": name, "training": vars(training), "runs": runs, "queries": count, "rows": whole | rows}
