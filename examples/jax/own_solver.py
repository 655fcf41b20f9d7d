"""A penalty per feature, with an inner solver of your own.

    python examples/jax/own_solver.py [--config examples/solver.toml] [--steps 60] [--seed 0]

The inner solver is an object with run(init_params, hparams, data), as in jaxopt. It is wrapped once; from then on,
`jax.value_and_grad` goes through it. Inner problem: softmax regression with a penalty for each of 64 pixels. Outer
problem: its loss on validation digits, by the 64 penalties.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from bilevel.demo.data import load
from bilevel_jax import implicit_minimizer


class Step(NamedTuple):
    """Where a solver is."""

    params: Any
    momentum: Any
    error: Any
    count: Any


@dataclass(frozen=True)
class AcceleratedDescent:
    """Nesterov's method down to a small gradient: a solver that knows nothing of hypergradients."""

    objective: Any
    step_size: float = 0.25
    decay: float = 0.9
    tol: float = 1e-4
    maxiter: int = 2000

    def run(self, init_params, hparams, data):
        """Minimize objective(params, hparams, data)."""

        def step(s):
            ahead = jax.tree.map(lambda w, m: w + self.decay * m, s.params, s.momentum)
            grads = jax.grad(self.objective)(ahead, hparams, data)
            momentum = jax.tree.map(lambda m, g: self.decay * m - self.step_size * g, s.momentum, grads)
            error = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
            return Step(jax.tree.map(jnp.add, s.params, momentum), momentum, error, s.count + 1)

        start = Step(init_params, jax.tree.map(jnp.zeros_like, init_params), jnp.inf, 0)
        return jax.lax.while_loop(lambda s: (s.error > self.tol) & (s.count < self.maxiter), step, start)


def cross_entropy(params, x, y):
    """Return the mean loss of a softmax regression."""
    log_probabilities = jax.nn.log_softmax(x @ params["kernel"] + params["bias"])
    return -jnp.mean(jnp.take_along_axis(log_probabilities, y[:, None], axis=1))


def inner(params, log_penalties, data):
    """Return the training loss."""
    penalty = jnp.sum(jnp.exp(log_penalties)[:, None] * params["kernel"] ** 2)
    return cross_entropy(params, *data) + penalty + 1e-3 * jnp.sum(params["bias"] ** 2)


def judge(params, validation, test):
    """Return what is reported of a classifier."""
    accuracy = jnp.mean(jnp.argmax(test[0] @ params["kernel"] + params["bias"], -1) == test[1])
    return {"validation_loss": float(cross_entropy(params, *validation)), "test": float(accuracy)}


def main(argv=None):
    """Tune, print both results, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    config = Path(__file__).parents[1] / "solver.toml"
    parser.add_argument("--config", metavar="FILE.toml", default=config, type=Path, help="a file with a table [solver]")
    parser.add_argument("--steps", default=60, type=int, help="outer steps")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    train, validation, test = (tuple(map(jnp.asarray, part)) for part in load(options.seed))

    solver = AcceleratedDescent(inner)

    @implicit_minimizer(inner, solver=options.config, on_failure="raise")
    def solve(log_penalties, data):
        init_params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
        return solver.run(init_params, log_penalties, data).params

    @jax.jit
    @jax.value_and_grad
    def outer(log_penalties):
        return cross_entropy(solve(log_penalties, train), *validation)

    log_penalties = jnp.full(64, -5.0)
    before = judge(solve(log_penalties, train), validation, test)
    optimizer = optax.adam(0.2)
    moments = optimizer.init(log_penalties)
    for _ in (bar := tqdm(range(options.steps))):
        loss, grads = outer(log_penalties)
        updates, moments = optimizer.update(grads, moments)
        log_penalties = jnp.clip(optax.apply_updates(log_penalties, updates), -9.0, 0.0)
        bar.set_postfix(validation=f"{loss:.3f}")

    after = judge(solve(log_penalties, train), validation, test)
    print(f"{'':22}validation loss  test accuracy")
    print(f"{'one penalty':22}{before['validation_loss']:15.3f}{before['test']:15.1%}")
    print(f"{'a penalty per pixel':22}{after['validation_loss']:15.3f}{after['test']:15.1%}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
