"""Inner and outer losses in JAX, each with a decay per weight as its hyperparameters; the networks of PyTorch's."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.speed.sizes import CLASSES, DECAYS, Size


class Workload(NamedTuple):
    """Losses as functions of weights, decays and data, and a point."""

    inner: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    params: dict[str, Any]
    log_decays: dict[str, Any]
    train: tuple[jax.Array, jax.Array]
    val: tuple[jax.Array, jax.Array]
    step_size: float

    @property
    def point(self) -> tuple[Any, ...]:
        """The arrays that a hypergradient is a function of."""
        return self.params, self.log_decays, self.train, self.val


class Maker:
    """Names weights and draws them, scaled by the number of inputs."""

    def __init__(self) -> None:
        self.rng, self.params = np.random.default_rng(0), {}

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Add a weight whose last axis is that of outputs."""
        scale = gain / np.prod(shape[:-1]) ** 0.5
        self.params[name] = jnp.asarray(scale * self.rng.standard_normal(shape), jnp.float32)

    def vector(self, name: str, size: int, value: float = 0.0) -> None:
        """Add a bias or a scale."""
        self.params[name] = jnp.full(size, value)

    def linear(self, name: str, inside: int, outside: int, gain: float = 1.0) -> None:
        """Add a layer."""
        self.weight(name, inside, outside, gain=gain)
        self.vector(f"{name}.bias", outside)


def linear(w: dict[str, Any], name: str, x: jax.Array) -> jax.Array:
    """Apply a layer."""
    return x @ w[name] + w[f"{name}.bias"]


def mlp(depth: int, w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Apply layers with tanh between them."""
    for i in range(depth - 1):
        x = jnp.tanh(linear(w, f"layer{i}", x))
    return linear(w, f"layer{depth - 1}", x)


def normalized(w: dict[str, Any], name: str, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Normalize over axes, and scale."""
    mean = x.mean(axes, keepdims=True)
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5) * w[name] + w[f"{name}.bias"]


def convolved(w: dict[str, Any], name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolve images of shape (n, height, width, channels), and normalize groups of channels."""
    x = lax.conv_general_dilated(x, w[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    groups = x.reshape(*x.shape[:3], 4, -1)
    mean = groups.mean((1, 2, 4), keepdims=True)
    variance = ((groups - mean) ** 2).mean((1, 2, 4), keepdims=True)
    return ((groups - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * w[f"{name}.scale"] + w[f"{name}.bias"]


def convnet(w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Apply a convolution and two residual blocks."""
    x = jax.nn.relu(convolved(w, "stem", x))
    x = jax.nn.relu(x + convolved(w, "block0.b", jax.nn.relu(convolved(w, "block0.a", x))))
    carried = convolved(w, "block1.carry", x, 2)
    x = jax.nn.relu(carried + convolved(w, "block1.b", jax.nn.relu(convolved(w, "block1.a", x, 2))))
    return linear(w, "head", x.mean((1, 2)))


def lstm(w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Read sequences of shape (n, time, features)."""
    inputs = linear(w, "input", x)

    def step(carry: tuple[jax.Array, jax.Array], now: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, cell = carry
        i, f, g, o = jnp.split(now + hidden @ w["hidden"], 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

    zero = jnp.zeros((len(x), w["hidden"].shape[0]))
    return linear(w, "head", lax.scan(step, (zero, zero), inputs.swapaxes(0, 1))[0][0])


def transformer(depth: int, w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Apply pre-norm encoder blocks to sequences of shape (n, time, width)."""
    n, time, width = x.shape
    for i in range(depth):
        qkv = linear(w, f"qkv{i}", normalized(w, f"norm{i}.a", x, (-1,))).reshape(n, time, 3, 4, width // 4)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // 4) ** -0.5)
        x = x + linear(w, f"out{i}", jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape))
        x = x + linear(w, f"down{i}", jax.nn.relu(linear(w, f"up{i}", normalized(w, f"norm{i}.b", x, (-1,)))))
    return linear(w, "head", x.mean(1))


def network(name: str, size: Size) -> tuple[Callable[..., jax.Array], dict[str, Any], tuple[int, ...]]:
    """Return a network, its weights, and the shape of an input."""
    make, width, features = Maker(), size.width, size.features
    if name in ("logistic", "mlp"):
        widths = [features, CLASSES] if name == "logistic" else [features, width, width, CLASSES]
        for i, (inside, outside) in enumerate(pairwise(widths)):
            make.linear(f"layer{i}", inside, outside)
        return partial(mlp, len(widths) - 1), make.params, (features,)
    if name == "convnet":
        shapes = {"stem": (3, width), "block0.a": (width, width), "block0.b": (width, width)}
        shapes |= {
            "block1.a": (width, 2 * width),
            "block1.b": (2 * width, 2 * width),
            "block1.carry": (width, 2 * width),
        }
        for layer, (inside, outside) in shapes.items():
            window = 1 if layer.endswith("carry") else 3
            make.weight(layer, window, window, inside, outside)
            make.vector(f"{layer}.scale", outside, 1.0)
            make.vector(f"{layer}.bias", outside)
        make.linear("head", 2 * width, CLASSES, gain=0.1)  # as in PyTorch's
        return convnet, make.params, (features, features, 3)
    if name == "lstm":
        make.linear("input", features, 4 * width)
        make.weight("hidden", width, 4 * width)
        make.linear("head", width, CLASSES)
        return lstm, make.params, (size.length, features)
    if name == "transformer":
        for i in range(size.depth):
            for norm in ("a", "b"):
                make.vector(f"norm{i}.{norm}", width, 1.0)
                make.vector(f"norm{i}.{norm}.bias", width)
            for layer, inside, outside in (("qkv", 1, 3), ("out", 1, 1), ("up", 1, 4), ("down", 4, 1)):
                make.linear(f"{layer}{i}", inside * width, outside * width)
        make.linear("head", width, CLASSES)
        return partial(transformer, size.depth), make.params, (size.length, width)
    raise ValueError(f"no workload {name!r}")


def workload(name: str, size: Size) -> Workload:
    """Make a workload with random data; see `benchmarks.speed.sizes.DECAYS`."""
    model, params, shape = network(name, size)
    rng = np.random.default_rng(1)

    def data() -> tuple[jax.Array, jax.Array]:
        return (
            jnp.asarray(rng.standard_normal((size.batch, *shape)), jnp.float32),
            jnp.asarray(rng.integers(CLASSES, size=size.batch)),
        )

    def decay(p: jax.Array) -> jax.Array:
        return jnp.asarray(rng.uniform(*np.log(DECAYS), size=p.shape), jnp.float32)

    def outer(w: Any, h: Any, batch: Any) -> jax.Array:
        del h
        x, y = batch
        return -jnp.take_along_axis(jax.nn.log_softmax(model(w, x)), y[:, None], 1).mean()

    def inner(w: Any, h: Any, batch: Any) -> jax.Array:
        return outer(w, h, batch) + sum(0.5 * jnp.vdot(jnp.exp(h[k]), w[k] ** 2) for k in w)

    return Workload(inner, outer, params, jax.tree.map(decay, params), data(), data(), size.step_size)
