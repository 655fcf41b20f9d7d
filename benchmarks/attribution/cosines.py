"""The cosine of each method's hypergradient to the derivative of the run, and measures that might tell it."""

from functools import cache

import jax.numpy as jnp
import numpy as np

from benchmarks.attribution.lds import cosine
from benchmarks.attribution.measures import measures
from benchmarks.attribution.methods import Answer, auto_damping, filtered, solved
from benchmarks.attribution.networks import digits, losses
from benchmarks.attribution.points import network, point, spectral
from benchmarks.attribution.runs import BLOCK, Objectives, Training, through_run


@cache
def validation_loss(name: str, examples: int) -> Objectives:
    """Return the mean loss of the images that follow the examples."""
    _, data = digits(examples)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    return lambda w: losses(network(name).logits(w, x), y).mean()[None]


def compare(name: str, training: Training, *, examples: int = 600) -> dict[str, object]:
    """Return the cosine and the products of each method at the end of a run, and the measures of trust."""
    data, _ = digits(examples)
    objectives = validation_loss(name, examples)
    truth = through_run(network(name), training, data, objectives)
    at = point(name, data, truth.w, objectives)
    hessian, gauss_newton = (spectral(at, matrix) for matrix in (at.hessian, at.gauss_newton))
    answers = [
        *solved(hessian, gauss_newton, training),
        Answer(f"unrolled, the last {BLOCK} steps", truth.last, 2.0 * BLOCK),
        *filtered(hessian, training),
    ]
    rows = {answer.method: [cosine(answer.gradients, truth.gradients), answer.products] for answer in answers}
    return {
        "network": name,
        "training": vars(training),
        "weights": len(truth.w),
        "loss": at.value,
        "outer": float(at.outer_values[0]),
        "eigenvalues": [float(hessian.values[0]), float(hessian.values[-1])],
        "damping": auto_damping(hessian),
        "norm": float(np.linalg.norm(truth.gradients)),
        "rows": rows,
        "measures": measures(at, hessian, truth.w),
    }
