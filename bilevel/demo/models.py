"""The two classifiers that the demo tunes, with a penalty for every weight."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.linear_solvers import CG
from bilevel.problems import logistic_regression
from bilevel.problems.linear import cross_entropy
from bilevel.problems.problem import Problem
from bilevel.spaces.namespace import namespace

CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A classifier, its bilevel problem, and the settings of the demo.

    ``hparams`` have the structure of ``params``: the logarithm of a penalty for each weight.
    """

    name: str
    problem: Problem
    logits: Callable[[Any, Any], Any]
    params0: Callable[[np.random.Generator, int], Any]  # (generator, number of pixels) -> params in NumPy
    features: Callable[[np.ndarray], np.ndarray]  # images -> X of the inner problem
    pixel_weights: Callable[[Any], np.ndarray]  # tree -> its part for pixels, of shape (pixels, k)
    solver: Any
    grid: np.ndarray  # shared penalties of the grid search
    bounds: tuple[float, float]  # of the tuned penalties
    start: float = 1e-2  # the first penalty of the tuning
    maxiter: int = 40
    gtol: float = 1e-8  # of the fits
    options: dict[str, Any] = field(default_factory=dict)  # of the search


def softmax_regression() -> Model:
    """Return softmax regression, in float64. It is convex and has analytic derivatives."""
    return Model(
        name="softmax regression",
        problem=logistic_regression(),
        logits=lambda params, X: X @ params,
        params0=lambda rng, pixels: np.zeros((pixels + 1, CLASSES)),
        features=lambda images: np.column_stack([images, np.ones(len(images))]),
        pixel_weights=lambda tree: tree[:-1],
        solver=CG(maxiter=1000),
        grid=np.logspace(-6, 0, 25),
        bounds=(1e-4, 1.0),
    )


def mlp(hidden: int = 256) -> Model:
    """Return a network with one hidden layer of tanh units, for torch and JAX, in float32.

    Its Hessian need not be positive definite at the end of a fit, so the linear solve is damped.
    """
    return Model(
        name=f"a network with {hidden} tanh units",
        problem=Problem(_penalized, _unpenalized),
        logits=_logits,
        params0=lambda rng, pixels: _random_params(rng, pixels, hidden),
        features=lambda images: images.astype(np.float32),
        pixel_weights=lambda tree: tree["W1"],
        solver=CG(maxiter=300, rtol=1e-4, damping=3e-3),
        grid=np.logspace(-5, -1, 13),
        bounds=(5e-4, 1e-1),
        maxiter=10,
        gtol=2e-4,  # 1e-4 takes three times the time, for no better test loss
        options={"maxls": 8},  # more trials do not help, because fits to 2e-4 leave noise
    )


def _random_params(rng: np.random.Generator, pixels: int, hidden: int) -> dict[str, np.ndarray]:
    params = {
        "W1": rng.normal(size=(pixels, hidden)) / pixels**0.5,
        "b1": np.zeros(hidden),
        "W2": rng.normal(size=(hidden, CLASSES)) / hidden**0.5,
        "b2": np.zeros(CLASSES),
    }
    return {name: array.astype(np.float32) for name, array in params.items()}


def _logits(params: Any, X: Any) -> Any:
    hidden = namespace(X).tanh(X @ params["W1"] + params["b1"])
    return hidden @ params["W2"] + params["b2"]


def _unpenalized(params: Any, hparams: Any, X: Any, y: Any) -> Any:
    return cross_entropy(_logits(params, X), y)


def _penalized(params: Any, hparams: Any, X: Any, y: Any) -> Any:
    exp = namespace(X).exp
    penalty = sum((exp(hparams[name]) * params[name] ** 2).sum() for name in params)
    return cross_entropy(_logits(params, X), y) + 0.5 * penalty
