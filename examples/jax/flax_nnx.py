"""A decay per weight of a network, in a training loop of Flax NNX.

    python examples/jax/flax_nnx.py [--config examples/solver.toml] [--steps 40] [--seed 0]

Inner problem: a perceptron of 2,410 weights on 300 digits, each weight with a decay of its own. Outer problem: the loss
on validation digits, by the 2,410 decays.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

import bilevel as bl
from bilevel.demo.data import load

INNER_STEPS = 25


class Perceptron(nnx.Module):
    """Two layers."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def cross_entropy(logits, y):
    """Return the mean loss of some predictions."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def decay(params, log_decays):
    """Return the penalty."""
    return sum(jax.tree.leaves(jax.tree.map(lambda w, h: jnp.sum(jnp.exp(h) * w**2), params, log_decays)))


@nnx.jit
def train_step(model, optimizer, log_decays, x, y):
    """Update the model and return the training loss."""

    def loss(model):
        return cross_entropy(model(x), y) + decay(nnx.state(model, nnx.Param), log_decays)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def make_problem(model):
    """Return the problem: the inner loss is told apart from its model, for Gauss-Newton products."""
    graph = nnx.graphdef(model)

    def predict(params, log_decays, x):
        return nnx.merge(graph, params)(x)

    def validation_loss(params, log_decays, x, y):
        return cross_entropy(predict(params, log_decays, x), y)

    return bl.Problem.from_model(predict, cross_entropy, validation_loss, penalty=decay)


def start(seed):
    """Return a new model and its optimizer."""
    model = Perceptron(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def judge(model, validation, test):
    """Return what is reported of a classifier."""
    accuracy = jnp.mean(jnp.argmax(model(test[0]), -1) == test[1])
    return {"validation_loss": float(cross_entropy(model(validation[0]), validation[1])), "test": float(accuracy)}


def main(argv=None):
    """Tune, print both results, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    config = Path(__file__).parents[1] / "solver.toml"
    parser.add_argument("--config", metavar="FILE.toml", default=config, type=Path, help="a file with a table [solver]")
    parser.add_argument("--steps", default=40, type=int, help="outer steps")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    train, validation, test = (tuple(map(jnp.asarray, part)) for part in load(options.seed))

    model, optimizer = start(options.seed)
    log_decays = jax.tree.map(lambda w: jnp.full_like(w, -9.0), nnx.state(model, nnx.Param))
    for _ in range(INNER_STEPS * options.steps):  # as long as it is tuned below
        train_step(model, optimizer, log_decays, *train)
    before = judge(model, validation, test)

    model, optimizer = start(options.seed)
    problem, adjoint = make_problem(model), None
    outer_optimizer = optax.adam(0.2)
    moments = outer_optimizer.init(log_decays)
    for _ in (bar := tqdm(range(options.steps))):
        for _ in range(INNER_STEPS):
            train_loss = train_step(model, optimizer, log_decays, *train)
        params = nnx.state(model, nnx.Param)
        hg = bl.hypergradient(
            problem,
            params,
            log_decays,
            inner_args=train,
            outer_args=validation,
            solver=options.config,
            adjoint0=adjoint,
        )
        adjoint = hg.adjoint
        updates, moments = outer_optimizer.update(hg.grad, moments)
        log_decays = optax.apply_updates(log_decays, updates)
        bar.set_postfix(train=f"{train_loss:.3f}", validation=f"{hg.value:.3f}")

    after = judge(model, validation, test)
    print(f"{'':22}validation loss  test accuracy")
    print(f"{'one small decay':22}{before['validation_loss']:15.3f}{before['test']:15.1%}")
    print(f"{'a decay per weight':22}{after['validation_loss']:15.3f}{after['test']:15.1%}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
