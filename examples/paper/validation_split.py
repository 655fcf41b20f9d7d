"""How much data should go to validation: with one weight decay, and with one for each weight.

    python examples/paper/validation_split.py --data DIR [--config examples/solver.toml]

Figure 9 of the paper. A logistic regression has n labelled images in all; a share of them is held out, and the weight
decay is tuned on it by hypergradients, along with training. What is held out is lost to training, unless one trains
again on all images with the weight decay that was found.

All seeds run at once, in one ``jit``: `jax.vmap` around a `jax.lax.scan` around `bl.hypergradient`.

A trap: with the logarithm of a weight decay as hyperparameter, gradient descent on the weights is stable only while
learning rate × decay stays below 2. A search that steps over this turns training into noise, from which no gradient
leads back. So the decays are projected onto [0, 1 / learning rate] after each step.
"""

import math
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
import data
import runs

FULL = {
    "points": (100, 1600),
    "shares": (0.0, 0.1, 0.25, 0.5, 0.75, 0.9),
    "outer_steps": 250,
    "inner_steps": 5,
}
FAST = {"points": (80,), "shares": (0.0, 0.25, 0.75), "outer_steps": 60, "inner_steps": 2}
SOLVERS = {"few": "identity", "many": "identity", "many_cg": {"name": "cg", "maxiter": 10, "damping": 0.1, "rtol": 0.1}}
LEARNING_RATE, OUTER_LEARNING_RATE, START = 0.1, 0.1, -7.0

inner_optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
outer_optimizer = optax.adam(OUTER_LEARNING_RATE)


def outer(w, log_decay, x, y):
    """Return the loss of a logistic regression; the last feature is constant, so that ``w`` is all there is."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()


def inner(w, log_decay, x, y):
    """Return the loss with weight decay: one, or one for each weight."""
    return outer(w, log_decay, x, y) + jnp.sum(jnp.exp(log_decay) * w**2) / 2


problem = bl.Problem(inner, outer)


def train(w, momentum, log_decay, train_set, steps):
    """Return weights and momentum after some steps."""

    def step(state, _):
        w, momentum = state
        updates, momentum = inner_optimizer.update(jax.grad(inner)(w, log_decay, *train_set), momentum)
        return (optax.apply_updates(w, updates), momentum), None

    return jax.lax.scan(step, (w, momentum), length=steps)[0]


@partial(jax.jit, static_argnames=("inner_steps", "outer_steps", "solver"))
@partial(jax.vmap, in_axes=(0, 0, 0, None, None, None))
def tune(log_decay, train_set, validation_set, inner_steps, outer_steps, solver):
    """Return weights, hyperparameters and how many linear systems were not solved; over seeds."""

    def outer_step(state, _):
        w, momentum, log_decay, moments = state
        w, momentum = train(w, momentum, log_decay, train_set, inner_steps)
        hg = bl.hypergradient(problem, w, log_decay, inner_args=train_set, outer_args=validation_set, solver=solver)
        updates, moments = outer_optimizer.update(hg.grad, moments)
        log_decay = jnp.minimum(optax.apply_updates(log_decay, updates), -math.log(LEARNING_RATE))
        return (w, momentum, log_decay, moments), hg.info.status != bl.Status.CONVERGED

    w = untrained(train_set)
    state = (w, inner_optimizer.init(w), log_decay, outer_optimizer.init(log_decay))
    (w, _, log_decay, _), unsolved = jax.lax.scan(outer_step, state, length=outer_steps)
    return w, log_decay, unsolved.sum()


@partial(jax.jit, static_argnames="steps")
@partial(jax.vmap, in_axes=(0, 0, None))
def fit(log_decay, train_set, steps):
    """Return weights trained from scratch; over seeds."""
    w = untrained(train_set)
    return train(w, inner_optimizer.init(w), log_decay, train_set, steps)[0]


def untrained(train_set):
    """Return weights of zero."""
    return jnp.zeros((train_set[0].shape[-1], 10))


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def accuracy(w, test_set):
    """Return the accuracy on test images; over seeds."""
    x, y = test_set
    return jnp.mean(jnp.argmax(x @ w, -1) == y)


def run(split, sizes, seeds, points, per_weight, solver):
    """Return the histories of all seeds: a row for each share of validation images."""
    start = time.process_time()
    chosen = np.stack([np.random.default_rng(seed).permutation(len(split.train.y))[:points] for seed in seeds])
    x, y = flat(split.train)
    x, y, test_set = x[chosen], y[chosen], flat(split.test)
    log_decay = jnp.full((len(seeds), *((x.shape[-1], 10) if per_weight else ())), START)
    steps = sizes["inner_steps"] * sizes["outer_steps"]
    rows = []
    for share in sizes["shares"]:
        held_out = round(share * points)
        if held_out:
            parts = (x[:, held_out:], y[:, held_out:]), (x[:, :held_out], y[:, :held_out])
            w, tuned, unsolved = tune(log_decay, *parts, sizes["inner_steps"], sizes["outer_steps"], solver)
            again = fit(tuned, (x, y), steps)
        else:
            tuned, unsolved = log_decay, jnp.zeros(len(seeds), int)
            w = again = fit(log_decay, (x, y), steps)
        columns = {
            "test": accuracy(w, test_set),
            "retrained": accuracy(again, test_set),
            "log_decay": tuned.reshape(len(seeds), -1).mean(1),
            "unsolved": unsolved,
        }
        rows.append(
            [{"share": share, **{k: round(float(v[i]), 5) for k, v in columns.items()}} for i in range(len(seeds))]
        )
    seconds = (time.process_time() - start) / len(seeds)
    return [history(list(of_seed), log_decay[0].size, seconds) for of_seed in zip(*rows, strict=True)]


def flat(images):
    """Return images as rows, with a constant feature, and their labels."""
    x = images.x.reshape(len(images.x), -1)
    return jnp.asarray(np.append(x, np.ones((len(x), 1), x.dtype), 1)), jnp.asarray(images.y)


def history(rows, hyperparameters, seconds):
    """Return what is stored of a seed."""
    result = {"hyperparameters": hyperparameters}
    for name in ("test", "retrained"):
        best = max(rows, key=lambda row: row[name])
        result |= {f"best_{name}": best[name], f"best_share_{name}": best["share"]}
    return {"rows": rows, "cpu_seconds": round(seconds, 2), "result": result}


def main(argv=None):
    """Run all numbers of points, kinds of weight decay and seeds; return the histories."""
    arguments = runs.options(__doc__, argv, seeds=4)
    sizes, split = FAST if arguments.fast else FULL, data.mnist(arguments.data)
    settings = {"data": split.name, "start": START, "rates": (LEARNING_RATE, OUTER_LEARNING_RATE), **sizes}
    histories = {}
    for variant, solver in runs.variants(arguments, SOLVERS).items():
        for points in sizes["points"]:
            made = partial(run, split, sizes, arguments.seeds, points, variant != "few", bl.get_solver(solver))
            made = cache(made)  # of all seeds at once, though each has a file of its own
            for i, seed in enumerate(arguments.seeds):
                name, about = f"{variant}-{points}-{seed}", {"solver": solver, "points": points, "seed": seed}
                histories[name] = runs.stored(
                    arguments, "validation_split", name, {**settings, **about}, lambda _, made=made, i=i: made()[i]
                )
    runs.show(histories)
    return histories


if __name__ == "__main__":
    main()
