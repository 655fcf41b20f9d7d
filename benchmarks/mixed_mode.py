"""Memory and time of the derivative of a few training steps of a transformer in JAX.

    python -m benchmarks.mixed_mode

The derivative is by a weight for each training example, through steps of Adam. Each row stores other parts of the run.
"Memory" is the temporary memory of the compiled program, as XLA reports it. It does not depend on the load of the
machine. "Time" is the best of a few runs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax

BATCH, LENGTH, WIDTH, HEADS, WORDS = 8, 64, 64, 4, 64
Params = dict[str, Any]


def initial(blocks: int) -> Params:
    """Return the weights of a transformer. Those of the blocks are stacked."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    return {
        "words": normal(WORDS, WIDTH),
        "places": normal(LENGTH, WIDTH),
        "blocks": {
            "qkv": normal(blocks, WIDTH, 3 * WIDTH),
            "out": normal(blocks, WIDTH, WIDTH),
            "up": normal(blocks, WIDTH, 4 * WIDTH),
            "down": normal(blocks, 4 * WIDTH, WIDTH),
        },
        "head": normal(WIDTH, WORDS),
    }


def normalized(x: jax.Array) -> jax.Array:
    """Return rows with mean 0 and variance 1."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def block(x: jax.Array, w: Params) -> jax.Array:
    """Return the output of one block, for x of shape (batch, length, width)."""
    batch, length, width = x.shape
    q, k, v = jnp.split((normalized(x) @ w["qkv"]).reshape(batch, length, HEADS, -1), 3, axis=-1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // HEADS) ** -0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, length, width)
    x = x + mixed @ w["out"]
    return x + jax.nn.gelu(normalized(x) @ w["up"]) @ w["down"]


def entropies(params: Params, text: jax.Array, checkpoint: bool) -> jax.Array:
    """Return the mean cross-entropy of the next word, for each row of text."""
    one = jax.checkpoint(block) if checkpoint else block
    x = params["words"][text[:, :-1]] + params["places"]
    x, _ = jax.lax.scan(lambda x, w: (one(x, w), None), x, params["blocks"])
    logits = jax.nn.log_softmax(normalized(x) @ params["head"])
    return -jnp.take_along_axis(logits, text[:, 1:, None], 2).mean((1, 2))


def loss(params: Params, hparams: jax.Array, batch: tuple[jax.Array, jax.Array], checkpoint: bool = False) -> jax.Array:
    """Return the weighted mean of the cross-entropies."""
    index, text = batch
    return jnp.mean(jax.nn.sigmoid(hparams[index]) * entropies(params, text, checkpoint))


GRADIENT = jax.checkpoint_policies.save_only_these_names("bilevel gradient")

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
ROWS: dict[str, tuple[bool, bool, Wrap]] = {  # mixed mode, checkpoint of each block, checkpoint of the step
    "plain": (False, False, lambda step: step),
    "step checkpointed": (False, False, jax.checkpoint),
    "step and blocks checkpointed": (False, True, jax.checkpoint),
    "mixed mode, step checkpointed": (True, False, jax.checkpoint),
    "mixed mode, step and blocks checkpointed": (True, True, jax.checkpoint),
    "the same, gradients saved": (True, True, partial(jax.checkpoint, policy=GRADIENT)),
}


def metagradient(blocks: int, steps: int, row: str) -> tuple[Any, tuple[jax.Array, Any]]:
    """Return the compiled derivative of a validation loss by the weights of the examples, and its arguments."""
    mixed, checkpoint, wrap = ROWS[row]
    step = bilevel_jax.TrainingStep(partial(loss, checkpoint=checkpoint), optax.adam(1e-3), mixed_mode=mixed)
    text = jax.random.randint(jax.random.key(1), (steps + 1, BATCH, LENGTH + 1), 0, WORDS)
    index = jnp.arange(steps * BATCH).reshape(steps, BATCH)
    body = wrap(step)

    def validation(hparams: jax.Array, text: jax.Array) -> jax.Array:
        state = step.init(initial(blocks))
        state, _ = jax.lax.scan(lambda s, b: (body(s, hparams, b), None), state, (index, text[:-1]))
        return jnp.mean(entropies(state.params, text[-1], checkpoint))

    args = (jnp.zeros(steps * BATCH), text)
    return jax.jit(jax.grad(validation)).lower(*args).compile(), args


def measure(blocks: int, steps: int, repeats: int) -> None:
    """Print one table."""
    print(f"\n{blocks} blocks, {steps} steps\n")
    plain, reference = 0.0, None
    for row in ROWS:
        program, args = metagradient(blocks, steps, row)
        memory = program.memory_analysis().temp_size_in_bytes / 2**20
        result = jax.block_until_ready(program(*args))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times.append(time.perf_counter() - start)
        if reference is None:
            plain, reference = memory, result
        error = jnp.linalg.norm(result - reference) / jnp.linalg.norm(reference)
        print(f"| {row} | {memory:.1f} MiB | {plain / memory:.1f} | {min(times):.2f} s | {error:.0e} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8])
    given = parser.parse_args()
    for blocks in given.blocks:
        for steps in given.steps:
            measure(blocks, steps, given.repeats)
