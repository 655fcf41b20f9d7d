"""A training set of ten learned images, in Equinox.

    python examples/jax/equinox_loop.py [--config examples/solver.toml] [--steps 100] [--seed 0]

Data set distillation: the hyperparameters are the training images themselves, one for each digit. Inner problem: train
a classifier on those ten. Outer problem: its loss on a thousand real digits, by the pixels.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from bilevel.demo.data import load
from bilevel_jax import implicit_minimizer

INNER_STEPS = 100


class Classifier(eqx.Module):
    """Softmax regression on normalized images."""

    norm: eqx.nn.LayerNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(64, use_weight=False, use_bias=False)
        self.linear = eqx.nn.Linear(64, 10, key=key)

    def __call__(self, x):
        return self.linear(self.norm(x))


def cross_entropy(model, x, y):
    """Return the mean loss of a model on a set of images."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def make_training(static, solver):
    """Return training(images, start) -> params, differentiable by the images; ``static`` is the rest."""

    def inner(params, images, start):
        size = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return cross_entropy(eqx.combine(params, static), images, jnp.arange(10)) + 1e-2 * size

    @implicit_minimizer(inner, solver=solver, on_failure="raise")
    def training(images, start):
        optimizer = optax.sgd(0.3, momentum=0.9)

        def step(state, _):
            params, moments = state
            updates, moments = optimizer.update(jax.grad(inner)(params, images, start), moments)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=INNER_STEPS)
        return params

    return training


def judge(params, static, validation, test):
    """Return what is reported of a classifier."""
    model = eqx.combine(params, static)
    accuracy = jnp.mean(jnp.argmax(jax.vmap(model)(test[0]), -1) == test[1])
    return {"validation_loss": float(cross_entropy(model, *validation)), "test": float(accuracy)}


def main(argv=None):
    """Tune, print both results, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    config = Path(__file__).parents[1] / "solver.toml"
    parser.add_argument("--config", metavar="FILE.toml", default=config, type=Path, help="a file with a table [solver]")
    parser.add_argument("--steps", default=100, type=int, help="outer steps")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    train, *parts = load(options.seed)
    x, y = (jnp.concatenate(both) for both in zip(train, parts[0], strict=True))
    test = tuple(map(jnp.asarray, parts[1]))

    model = Classifier(jax.random.key(options.seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    training = make_training(static, options.config)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def outer(images, start, x, y):
        params = training(images, start)
        return cross_entropy(eqx.combine(params, static), x, y), params

    images = jnp.stack([x[y == digit][0] for digit in range(10)])  # a real one of each digit
    before = judge(training(images, params), static, (x, y), test)

    optimizer = optax.adam(0.02)
    moments = optimizer.init(images)
    for _ in (bar := tqdm(range(options.steps))):
        (loss, params), grads = outer(images, params, x, y)
        updates, moments = optimizer.update(grads, moments)
        images = optax.apply_updates(images, updates)
        bar.set_postfix(real_digits=f"{loss:.3f}")

    after = judge(training(images, params), static, (x, y), test)
    print(f"{'':22}loss on real digits  test accuracy")
    print(f"{'ten real images':22}{before['validation_loss']:19.3f}{before['test']:15.1%}")
    print(f"{'ten learned images':22}{after['validation_loss']:19.3f}{after['test']:15.1%}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
