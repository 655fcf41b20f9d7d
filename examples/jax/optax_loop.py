"""A weight per training example, learned under label noise, in a loop of optax that is one jit per outer step.

    python examples/jax/optax_loop.py [--config examples/solver.toml] [--steps 60] [--seed 0]

Four in ten labels of the training digits are wrong. Inner problem: softmax regression on the weighted examples. Outer
problem: its loss on clean validation digits, by the weights. Those of wrong labels go to zero.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bilevel as bl
from bilevel.demo.data import load

INNER_STEPS = 50


def logits(params, x):
    """Return what a softmax regression predicts."""
    return x @ params["kernel"] + params["bias"]


def inner(params, log_odds, x, y):
    """Return the training loss, each example with its weight."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return jnp.mean(jax.nn.sigmoid(log_odds) * losses) + 1e-3 * optax.tree.norm(params, squared=True)


def outer(params, log_odds, x, y):
    """Return the validation loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


problem = bl.Problem(inner, outer)
inner_optimizer, outer_optimizer = optax.sgd(0.5, momentum=0.9), optax.adam(0.3)


@jax.jit
def train(params, log_odds, x, y):
    """Return the params after some steps of the inner optimizer, and the training loss."""

    def step(state, _):
        params, moments = state
        loss, grads = jax.value_and_grad(inner)(params, log_odds, x, y)
        updates, moments = inner_optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), loss

    (params, _), losses = jax.lax.scan(step, (params, inner_optimizer.init(params)), length=INNER_STEPS)
    return params, losses[-1]


def make_outer_step(solver):
    """Return the outer step; it carries the adjoint along, to start the next linear solve from."""

    def outer_step(state, train_set, validation_set):
        params, log_odds, moments, adjoint = state
        params, inner_loss = train(params, log_odds, *train_set)
        hg = bl.hypergradient(
            problem,
            params,
            log_odds,
            inner_args=train_set,
            outer_args=validation_set,
            solver=solver,
            adjoint0=adjoint,
        )
        updates, moments = outer_optimizer.update(hg.grad, moments)
        log_odds = optax.apply_updates(log_odds, updates)
        solved = hg.info.status == bl.Status.CONVERGED  # in jit, only the status tells
        return (params, log_odds, moments, hg.adjoint), (inner_loss, hg.value, solved)

    return jax.jit(outer_step, donate_argnums=0)


def judge(params, validation, test):
    """Return what is reported of a classifier."""
    accuracy = jnp.mean(jnp.argmax(logits(params, test[0]), -1) == test[1])
    return {"validation_loss": float(outer(params, None, *validation)), "test": float(accuracy)}


def main(argv=None):
    """Tune, print both results, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    config = Path(__file__).parents[1] / "solver.toml"
    parser.add_argument("--config", metavar="FILE.toml", default=config, type=Path, help="a file with a table [solver]")
    parser.add_argument("--steps", default=60, type=int, help="outer steps")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)

    digits = load(options.seed)
    rng = np.random.default_rng(options.seed)
    wrong = rng.random(len(digits.train.y)) < 0.4
    labels = np.where(wrong, (digits.train.y + rng.integers(1, 10, len(wrong))) % 10, digits.train.y)
    train_set = jnp.asarray(digits.train.X), jnp.asarray(labels)
    validation_set, test_set = (tuple(map(jnp.asarray, part)) for part in (digits.validation, digits.test))

    def untrained():
        return {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}

    log_odds = jnp.zeros(len(labels))
    params = untrained()
    for _ in range(options.steps):  # as long as it is tuned below
        params, _ = train(params, log_odds, *train_set)
    before = judge(params, validation_set, test_set)

    state = (untrained(), log_odds, outer_optimizer.init(log_odds), untrained())
    outer_step, unsolved = make_outer_step(options.config), 0
    for _ in (bar := tqdm(range(options.steps))):
        state, (inner_loss, outer_loss, solved) = outer_step(state, train_set, validation_set)
        unsolved += not solved
        bar.set_postfix(train=f"{inner_loss:.3f}", validation=f"{outer_loss:.3f}", unsolved=unsolved)

    params, log_odds = state[:2]
    after = judge(params, validation_set, test_set)
    weights = jax.nn.sigmoid(log_odds)
    right, not_right = float(weights[~wrong].mean()), float(weights[wrong].mean())
    print(f"{'':22}validation loss  test accuracy")
    print(f"{'equal weights':22}{before['validation_loss']:15.3f}{before['test']:15.1%}")
    print(f"{'learned weights':22}{after['validation_loss']:15.3f}{after['test']:15.1%}")
    print(f"mean weight of right labels {right:.2f}, of wrong ones {not_right:.2f}; unsolved systems: {unsolved}")
    return {"before": before, "after": after, "right": right, "wrong": not_right, "unsolved": unsolved}


if __name__ == "__main__":
    main()
