"""How well `bl.diagnose_training` tells whether metagradients predict retraining without examples.

Networks on 600 digits with a weight for each example, trained by momentum or Adam in ways from smooth to chaotic. The
truth is the linear datamodeling score: the rank correlation of predicted and actual losses of 20 queries over 60
trainings without 5 % of the examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from benchmarks.attribution.lds import left_out, queries, score, spearman
from benchmarks.attribution.networks import digits
from benchmarks.attribution.points import network
from benchmarks.attribution.runs import MOMENTUM, Training, inner, retrain

EXAMPLES, RUNS, QUERIES = 600, 60, 20
BETA2, EPS, TINY = 0.999, 1e-8, 1e-30

RECIPES = [
    ("MLP, tanh", Training(160, rate=0.05)),
    ("MLP, tanh", Training(160, rate=0.05, batch=20)),
    ("MLP, tanh", Training(160, rate=0.5)),
    ("MLP, tanh", Training(160, rate=1.5)),
    ("MLP, tanh", Training(160, "adam", rate=0.01)),
    ("MLP, ReLU", Training(160, rate=0.05)),
    ("MLP, ReLU", Training(160, rate=0.2, batch=20)),
    ("MLP, ReLU", Training(160, rate=0.5)),
    ("convnet", Training(160, rate=0.01)),
    ("convnet", Training(160, rate=0.05)),
    ("LSTM", Training(160, rate=0.05)),
    ("LSTM", Training(160, rate=0.2)),
    ("attention", Training(160, rate=0.01)),
    ("attention", Training(160, rate=0.05)),
]
SMOOTH = RECIPES[0], ("MLP, tanh", Training(160, rate=0.05, batch=600)), RECIPES[5]
LOW = RECIPES[-1], RECIPES[4], RECIPES[0]  # also in bfloat16


@dataclass(frozen=True)
class Step:
    """A step of a recipe."""

    name: str
    training: Training

    def __call__(self, state: Any, weights: jax.Array, batch: Any) -> Any:
        t, x, y, index = batch
        w, m, s = state
        g = jax.grad(lambda w: inner(network(self.name), w, weights[index], x, y))(w)
        rate = self.training.rate
        if self.training.optimizer == "momentum":
            m = MOMENTUM * m + g
            return w - rate * m, m, s
        m, s = MOMENTUM * m + (1 - MOMENTUM) * g, BETA2 * s + (1 - BETA2) * g**2
        root = jnp.sqrt(s / (1 - BETA2**t) + TINY)
        return w - rate * m / (1 - MOMENTUM**t) / (root + EPS), m, s


def problem(name: str, training: Training, dtype: Any = np.float64) -> tuple[bl.Training, dict[str, Any]]:
    """Return a run with its queries as outer objectives, and the arguments of `bl.metagradient`."""
    data, held_out = digits(EXAMPLES)
    objectives = queries(name, held_out, QUERIES)
    batches = [
        (np.asarray(t + 1, dtype), data.x[index].astype(dtype), data.y[index], index)
        for t, index in enumerate(training.batches(EXAMPLES))
    ]
    w = jnp.asarray(network(name).init(training.seed), dtype)
    state = w, jnp.zeros_like(w), jnp.zeros_like(w)
    run = bl.Training(Step(name, training), lambda state, weights: objectives(state[0]).astype(state[0].dtype))
    return run, {"state": state, "hparams": jnp.ones(EXAMPLES, dtype), "batches": batches}


def row(name: str, training: Training) -> dict[str, Any]:
    """Return the score of the metagradients of a run, and the numbers of its report."""
    data, held_out = digits(EXAMPLES)
    run, args = problem(name, training)
    report = bl.diagnose_training(run, **args)
    weights = left_out(RUNS, EXAMPLES, training.seed)
    actual = retrain(network(name), training, data, queries(name, held_out, QUERIES), weights)
    lds = score(np.asarray(report.metagradient.grad), weights, actual)
    found = {"agreement": report.agreement, "metasmoothness": report.smoothness, "growth": report.growth}
    return {"name": name, **vars(training), "lds": lds, **found, "findings": [f.name for f in report.findings]}


def rows() -> Iterator[dict[str, Any]]:
    """Yield the rows of all recipes."""
    for name, training in RECIPES:
        yield row(name, training)


def main() -> None:
    """Print the table, and how each number ranks the scores."""
    found = []
    for each in rows():
        found.append(each)
        run = f"{each['name']}, {each['optimizer']}, rate {each['rate']}, batches of {each['batch']}"
        numbers = " | ".join(f"{each[k]:.3g}" for k in ("lds", "agreement", "metasmoothness", "growth"))
        print(f"| {run} | {numbers} | {', '.join(each['findings'])} |", flush=True)
    scores = [each["lds"] for each in found]
    for key in ("agreement", "metasmoothness"):
        print(f"Spearman's correlation of {key} and LDS: {spearman([each[key] for each in found], scores):.2f}")
    for recipe in LOW:
        for dtype in (jnp.float32, jnp.bfloat16):
            run, args = problem(*recipe, dtype)
            report = bl.diagnose_training(run, **args)
            names = [finding.name for finding in report.findings]
            print(f"{recipe[0]} in {np.dtype(dtype)}: precision {report.precision:.4f}, {names}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
