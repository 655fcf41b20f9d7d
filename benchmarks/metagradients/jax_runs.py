"""Time and memory of metagradients in JAX against a scan with checkpoints that is written by hand."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevel as bl

RATE, BETA1, BETA2, EPS, TINY, TRAIN = 1e-3, 0.9, 0.999, 1e-8, 1e-30, 600


def losses(w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example."""
    for a, b in w[:-1]:
        x = jnp.tanh(x @ a + b)
    logits = x @ w[-1][0] + w[-1][1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]


def step(state: Any, weights: jax.Array, batch: Any) -> Any:
    """Take a step of Adam on the losses times the weights of the examples."""
    x, y, index, t = batch
    w, m, s = state
    g = jax.grad(lambda w: (weights[index] * losses(w, x, y)).mean())(w)
    m = jax.tree.map(lambda a, b: BETA1 * a + (1 - BETA1) * b, m, g)
    s = jax.tree.map(lambda a, b: BETA2 * a + (1 - BETA2) * b**2, s, g)

    def moved(w: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        return w - RATE * m / (1 - BETA1**t) / (jnp.sqrt(s / (1 - BETA2**t) + TINY) + EPS)

    return jax.tree.map(moved, w, m, s), m, s


class Digits:
    """Runs on the digits.

    Args:
        steps: the number of steps.
        sizes: of the layers.
        batch: the number of examples of a step.
    """

    def __init__(self, steps: int, sizes: tuple[int, ...] = (64, 32, 10), batch: int = 100) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = (images / 16).astype(np.float32), labels
        rng = np.random.default_rng(0)
        w = [
            (jnp.asarray(rng.normal(0, n**-0.5, (n, m)), jnp.float32), jnp.zeros(m, jnp.float32))
            for n, m in pairwise(sizes)
        ]
        zeros = jax.tree.map(jnp.zeros_like, w)
        self.first, self.weights = (w, zeros, zeros), jnp.ones(TRAIN, jnp.float32)
        indices = [rng.choice(TRAIN, batch, replace=False) for _ in range(steps)]
        self.batches = [(x[i], y[i], i, np.float32(t + 1)) for t, i in enumerate(indices)]
        self.stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *self.batches)
        self.validation = jnp.asarray(x[TRAIN:]), jnp.asarray(y[TRAIN:])
        self.compiled = {way: jax.jit(jax.grad(partial(self.run, way))) for way in ("scan", "remat", "nested")}
        self.forward = jax.jit(partial(self.run, "scan"))

    def outer(self, state: Any, weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses(state[0], x, y).mean()

    def run(self, way: str, weights: jax.Array) -> jax.Array:
        def body(state: Any, batch: Any) -> tuple[Any, None]:
            return step(state, weights, batch), None

        if way == "nested":
            block = int(len(self.batches) ** 0.5)
            while len(self.batches) % block:
                block -= 1
            parts = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), self.stacked)
            inner = jax.checkpoint(body, prevent_cse=False)
            outer = jax.checkpoint(lambda s, xs: (jax.lax.scan(inner, s, xs)[0], None), prevent_cse=False)
            state = jax.lax.scan(outer, self.first, parts)[0]
        else:
            body = jax.checkpoint(body, prevent_cse=False) if way == "remat" else body
            state = jax.lax.scan(body, self.first, self.stacked)[0]
        return self.outer(state, weights, *self.validation)

    def train(self) -> Any:
        return jax.block_until_ready(self.forward(self.weights))

    def by_hand(self, way: str) -> Any:
        return jax.block_until_ready(self.compiled[way](self.weights))

    def each(self, state: Any, weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the losses of 20 queries."""
        return losses(state[0], x[:20], y[:20])

    def ours(self, outer: Any = None, **options: Any) -> Any:
        training = bl.Training(step, outer or self.outer)
        found = bl.metagradient(training, self.first, self.weights, self.batches, outer_args=self.validation, **options)
        return jax.block_until_ready(found.grad)
