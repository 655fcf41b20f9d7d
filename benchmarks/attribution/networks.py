"""Small networks for scikit-learn's digits, as functions of flat weights, and the data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

CLASSES = 10


class Network(NamedTuple):
    """``init(seed)`` returns flat weights; ``logits(w, x)`` takes images of shape (n, 8, 8) and returns (n, 10)."""

    init: Callable[[int], np.ndarray]
    logits: Callable[[Array, Array], Array]


class Digits(NamedTuple):
    """Images (n, 8, 8) with values from 0 to 1, and their labels."""

    x: np.ndarray
    y: np.ndarray


def digits(train: int = 600, validation: int = 600) -> tuple[Digits, Digits]:
    """Return training and validation data."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]
    held_out = slice(train, train + validation)
    return Digits(images[:train], labels[:train]), Digits(images[held_out], labels[held_out])


def losses(logits: Array, y: Array) -> Array:
    """Return the cross-entropy of each example."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]


def _network(shapes: dict[str, tuple[int, ...]], forward: Callable[[dict[str, Array], Array], Array]) -> Network:
    """Draw matrices with variance 1 / rows. Vectors start at zero."""
    unravel = ravel_pytree({name: jnp.zeros(shape) for name, shape in shapes.items()})[1]

    def init(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        drawn = {
            name: rng.standard_normal(shape) / np.sqrt(shape[0]) if len(shape) == 2 else np.zeros(shape)
            for name, shape in shapes.items()
        }
        return np.concatenate([drawn[name].ravel() for name in sorted(drawn)])  # the order of ravel_pytree

    return Network(init, lambda w, x: forward(unravel(w), x))


def mlp(activation: Callable[[Array], Array]) -> Network:
    """Return the network 64-32-10."""
    shapes = {"w1": (64, 32), "b1": (32,), "w2": (32, CLASSES), "b2": (CLASSES,)}

    def forward(p: dict[str, Array], x: Array) -> Array:
        return activation(x.reshape(-1, 64) @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return _network(shapes, forward)


def convnet() -> Network:
    """Return two 3x3 convolutions, written as products, since JAX is slow at convolutions in loops on CPUs."""
    shapes = {"w1": (9, 8), "b1": (8,), "w2": (72, 16), "b2": (16,), "w3": (64, CLASSES), "b3": (CLASSES,)}

    def patches(x: Array, stride: int) -> Array:
        rows, columns = x.shape[1] - 2, x.shape[2] - 2
        shifted = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1)

    def forward(p: dict[str, Array], x: Array) -> Array:
        x = jnp.pad(x[..., None], ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jax.nn.gelu(patches(x, 2) @ p["w1"] + p["b1"])
        x = jax.nn.gelu(patches(x, 1) @ p["w2"] + p["b2"])
        return x.reshape(-1, 64) @ p["w3"] + p["b3"]

    return _network(shapes, forward)


def lstm(width: int = 16) -> Network:
    """Return an LSTM that reads an image row by row."""
    shapes = {"w": (8 + width, 4 * width), "b": (4 * width,), "head": (width, CLASSES), "bias": (CLASSES,)}

    def forward(p: dict[str, Array], x: Array) -> Array:
        def read(state: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
            hidden, cell = state
            i, f, g, o = jnp.split(jnp.concatenate([row, hidden], axis=1) @ p["w"] + p["b"], 4, axis=1)
            cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

        zero = jnp.zeros((len(x), width), x.dtype)
        (hidden, _), _ = jax.lax.scan(read, (zero, zero), x.swapaxes(0, 1))
        return hidden @ p["head"] + p["bias"]

    return _network(shapes, forward)


def attention(width: int = 16) -> Network:
    """Return one layer of attention over the rows of an image, and a residual layer of tanh."""
    shapes = {
        "embed": (8, width),
        "place": (8, width),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "w": (width, width),
        "b": (width,),
        "head": (width, CLASSES),
        "bias": (CLASSES,),
    }

    def forward(p: dict[str, Array], x: Array) -> Array:
        x = x @ p["embed"] + p["place"]
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        x = x + jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(width)) @ v @ p["out"]
        x = x + jnp.tanh(x @ p["w"] + p["b"])
        return x.mean(1) @ p["head"] + p["bias"]

    return _network(shapes, forward)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP, tanh": lambda: mlp(jnp.tanh),
    "MLP, ReLU": lambda: mlp(jax.nn.relu),
    "convnet": convnet,
    "LSTM": lstm,
    "attention": attention,
}
