"""Training runs written by hand, so that JAX differentiates them exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.attribution.networks import Digits, Network, losses

MOMENTUM = 0.9
BETA2, EPS = 0.999, 1e-8
TINY = 1e-30  # inside Adam's root, which has no derivative at zero
BLOCK = 20  # steps that are compiled and differentiated together; JAX stores the states between blocks only


@dataclass(frozen=True)
class Training:
    """A run of SGD with momentum, or of Adam, on the mean of λᵢ times the loss of example i.

    Attributes:
        steps: a multiple of `BLOCK`.
        optimizer: "momentum" or "adam".
        rate: the learning rate.
        batch: examples of a step.
        seed: of the initial weights and of the batches.
    """

    steps: int
    optimizer: str = "momentum"
    rate: float = 0.05
    batch: int = 100
    seed: int = 0

    @property
    def time(self) -> float:
        """The step of plain gradient descent that moves as far, times the number of steps."""
        return self.rate / (1 - MOMENTUM) * self.steps

    def batches(self, examples: int) -> np.ndarray:
        """Return the examples of each step: each epoch is a random order of all examples."""
        rng = np.random.default_rng(self.seed)
        epochs = -(-self.steps * self.batch // examples)
        order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
        return order[: self.steps * self.batch].reshape(self.steps, self.batch)


class _State(NamedTuple):
    w: Array
    m: Array
    s: Array


def inner(network: Network, w: Array, weights: Array, x: Array, y: Array) -> Array:
    """Return L, the mean of the losses times the weights."""
    return (weights * losses(network.logits(w, x), y)).mean()


Objectives = Callable[[Array], Array]  # weights of the network to a vector of losses


def _start(w: np.ndarray) -> _State:
    return _State(jnp.asarray(w), jnp.zeros(w.shape), jnp.zeros(w.shape))


@cache
def _block(network: Network, optimizer: str, rate: float) -> Callable[..., _State]:
    """Return ``run(weights, state, first, batches, x, y)``, which takes a step of training for each row of batches."""

    def step(weights: Array, x: Array, y: Array, state: _State, at: tuple[Array, Array]) -> tuple[_State, None]:
        t, batch = at
        g = jax.grad(partial(inner, network))(state.w, weights[batch], x[batch], y[batch])
        if optimizer == "momentum":
            m = MOMENTUM * state.m + g
            return _State(state.w - rate * m, m, state.s), None
        m = MOMENTUM * state.m + (1 - MOMENTUM) * g
        s = BETA2 * state.s + (1 - BETA2) * g**2
        root = jnp.sqrt(s / (1 - BETA2**t) + TINY)
        return _State(state.w - rate * m / (1 - MOMENTUM**t) / (root + EPS), m, s), None

    def run(weights: Array, state: _State, first: Array, batches: Array, x: Array, y: Array) -> _State:
        steps = first + jnp.arange(1.0, len(batches) + 1)
        return jax.lax.scan(partial(step, weights, x, y), state, (steps, batches))[0]

    return run


@cache
def _forward(network: Network, optimizer: str, rate: float) -> Callable[..., _State]:
    """Return the block, compiled, for rows of weights and states."""
    return jax.jit(jax.vmap(_block(network, optimizer, rate), (0, 0, None, None, None, None)))


@cache
def _backward(network: Network, optimizer: str, rate: float) -> Callable[..., tuple[Array, _State]]:
    """Return the derivative of a block: rows of cotangents of its end to rows for its weights and start."""

    @jax.jit
    def back(cotangents: _State, weights: Array, state: _State, *rest: Array) -> tuple[Array, _State]:
        block = _block(network, optimizer, rate)
        _, pullback = jax.vjp(lambda weights, state: block(weights, state, *rest), weights, state)
        return jax.vmap(pullback)(cotangents)

    return back


def _blocks(training: Training, data: Digits) -> list[tuple[Array, ...]]:
    """Return the arguments of the blocks that follow the weights and the state."""
    batches = training.batches(len(data.y)).reshape(-1, BLOCK, training.batch)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    return [(jnp.asarray(float(BLOCK * k)), jnp.asarray(block), x, y) for k, block in enumerate(batches)]


class Truth(NamedTuple):
    """The end of a run, and the derivatives of objectives by λ.

    Attributes:
        w: weights of the network after the last step.
        gradients: derivatives through the whole run, of shape (objectives, examples).
        last: the part of the last `BLOCK` steps.
    """

    w: np.ndarray
    gradients: np.ndarray
    last: np.ndarray


def through_run(network: Network, training: Training, data: Digits, objectives: Objectives) -> Truth:
    """Train with λ = 1, and differentiate the objectives through all steps, in reverse mode."""
    key = network, training.optimizer, training.rate
    weights, blocks = jnp.ones(len(data.y)), _blocks(training, data)
    rows = jax.tree.map(lambda entry: entry[None], _start(network.init(training.seed)))
    states = [rows]
    for block in blocks:
        states.append(_forward(*key)(weights[None], states[-1], *block))
    *starts, end = [jax.tree.map(lambda entry: entry[0], state) for state in states]
    rhs = jax.jit(jax.jacrev(objectives))(end.w)
    cotangents, parts = _State(rhs, jnp.zeros_like(rhs), jnp.zeros_like(rhs)), []
    for state, block in zip(reversed(starts), reversed(blocks), strict=True):
        part, cotangents = _backward(*key)(cotangents, weights, state, *block)
        parts.append(np.asarray(part))
    return Truth(np.asarray(end.w), np.sum(parts, axis=0), parts[0])


def retrain(
    network: Network, training: Training, data: Digits, objectives: Objectives, weights: np.ndarray
) -> np.ndarray:
    """Return the objectives after a run for each row of weights, of shape (runs, objectives)."""
    start = _start(network.init(training.seed))
    state = jax.tree.map(lambda entry: jnp.tile(entry, (len(weights), 1)), start)
    for block in _blocks(training, data):
        state = _forward(network, training.optimizer, training.rate)(jnp.asarray(weights), state, *block)
    return np.asarray(jax.jit(jax.vmap(objectives))(state.w))
