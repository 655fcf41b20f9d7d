"""Pytrees as vectors, and `jax.lax` loops, so that a whole hypergradient compiles."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax.no_reverse_mode import forward_only, refuse
from bilevel_jax.sharding import equations, explicitly_sharded

UNROLLED = 20  # steps: the terms that neumann takes by default; compiling takes longer with each


class JaxSpace:
    """See `bilevel.protocols.VectorSpace`."""

    xp = jnp

    def dot(self, x: Any, y: Any) -> jax.Array:
        return jax.tree.reduce(jnp.add, jax.tree.map(_dot, x, y))

    def axpy(self, alpha: Any, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.asarray(alpha, b.dtype) * a + b, x, y)

    def scale(self, alpha: Any, x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.asarray(alpha, a.dtype) * a, x)

    def update(self, flag: Any, alpha: Any, x: Any, y: Any, beta: Any = None) -> Any:
        return self.select(flag, self.axpy(alpha, x, y if beta is None else self.scale(beta, y)), y)

    def zeros_like(self, x: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, x)

    def map(self, function: Callable, x: Any, *rest: Any) -> Any:
        return jax.tree.map(lambda a, *others: jnp.asarray(function(a, *others), a.dtype), x, *rest)

    def select(self, flag: Any, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(flag, a, b), x, y)

    def normal_like(self, x: Any, seed: int) -> Any:
        leaves, structure = jax.tree.flatten(x)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        # Zeros of the leaf, here and below, to be typed like it: varying over the axes of a shard_map, sharded.
        draws = [jnp.zeros_like(a) + jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, draws)

    def max_abs(self, x: Any) -> jax.Array:
        parts = [jnp.max(jnp.abs(leaf), initial=0).astype(_accumulator(leaf, leaf)) for leaf in jax.tree.leaves(x)]
        return jnp.stack(jnp.broadcast_arrays(*parts)).max()

    def isfinite(self, x: Any) -> jax.Array:
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(x)]).all()

    def eps(self, x: Any) -> float:
        return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x))

    def size(self, x: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(x))

    def stack_like(self, x: Any, count: int) -> Any:
        return jax.tree.map(lambda a: jnp.broadcast_to(jnp.zeros_like(a), (count, *a.shape)), x)

    def put(self, stack: Any, i: Any, x: Any) -> Any:
        return jax.tree.map(lambda s, a: s.at[i].set(a), stack, x)

    def take(self, stack: Any, i: Any) -> Any:
        return jax.tree.map(lambda s: s[i], stack)

    def project(self, stack: Any, x: Any) -> jax.Array:
        return jax.tree.reduce(jnp.add, jax.tree.map(_project, stack, x))

    def combine(self, coefficients: Any, stack: Any) -> Any:
        return jax.tree.map(
            lambda s: jnp.tensordot(coefficients.astype(s.dtype), s, 1, precision=lax.Precision.HIGHEST), stack
        )

    def sequence(self, items: Sequence[Any]) -> Callable[[Any], Any]:
        if len(items) == 1:
            return lambda i: items[0]
        count = len(items)
        leaves, structure = _stack(items)
        return lambda i: jax.tree.unflatten(structure, [leaf(i % count) for leaf in leaves])

    def while_loop(self, live: Callable, body: Callable, state: Any, max_steps: int) -> Any:
        # Without an end before: once its flag is down, a body changes nothing.
        unrolled = min(max_steps, _steps_outside(body, state, max_steps))
        for _ in range(unrolled):
            state = body(state)
        max_steps -= unrolled
        if not max_steps:
            return state

        def counted_live(carry: Any) -> Any:
            return (carry[0] < max_steps) & live(carry[1])

        def counted_body(carry: Any) -> Any:
            return carry[0] + 1, body(carry[1])

        with _in_loop():
            return forward_only(lax.while_loop(counted_live, counted_body, (0, state))[1])

    def scan(self, body: Callable, state: Any, xs: Any, length: int, reverse: bool = False) -> tuple[Any, Any]:
        first = None if xs is None else jax.tree.map(lambda a: a[0], xs)
        unroll = 0 < length == _steps_outside(lambda s: body(s, first), state, length)
        with nullcontext() if unroll else _in_loop():
            return lax.scan(body, state, xs, length=length, reverse=reverse, unroll=unroll)

    def cond(self, flag: Any, body: Callable, state: Any) -> Any:
        return lax.cond(flag, body, lambda s: s, state)

    def ravel(self, x: Any) -> jax.Array:
        return ravel_pytree(x)[0]

    def unravel(self, array: Any, like: Any) -> Any:
        flat, unravel = ravel_pytree(like)
        return unravel(array.astype(flat.dtype))

    def dense(self, operator: Callable, like: Any) -> jax.Array:
        flat, unravel = ravel_pytree(like)
        rows = lax.map(lambda e: self.ravel(operator(unravel(e))), jnp.diag(jnp.ones_like(flat)))
        return rows.T

    def on_host(self, function: Callable, *arrays: Any) -> jax.Array:
        like = arrays[-1]

        def call(*host: Any) -> np.ndarray:
            return function(*(np.asarray(a, np.float64) for a in host)).astype(like.dtype)

        @jax.custom_jvp
        def without_derivative(*arrays: Any) -> jax.Array:
            result = jax.ShapeDtypeStruct(like.shape, like.dtype)
            return jax.pure_callback(call, result, *arrays, vmap_method="sequential")

        without_derivative.defjvp(refuse)
        return jnp.zeros_like(like) + without_derivative(*arrays)


_looping: ContextVar[bool] = ContextVar("whether the body of a loop is being traced", default=False)


@contextmanager
def _in_loop() -> Iterator[None]:
    before = _looping.set(True)
    try:
        yield
    finally:
        _looping.reset(before)


def _steps_outside(body: Callable, state: Any, steps: int) -> int:
    """Return how many steps of a loop to take outside of it, where it has a convolution and runs on a CPU.

    XLA's CPU code for a convolution's derivatives takes some ten times as long inside a loop as outside (jax#12868). So
    a short loop is unrolled, unless it is in another. Of one that has another in it, such as the sweeps of an iterative
    solver, the first step goes before it, and does the same to the loop within.
    """
    if _looping.get() or jax.default_backend() != "cpu":
        return 0
    with _in_loop():
        jaxpr = jax.make_jaxpr(body)(state).jaxpr
    names = {equation.primitive.name for equation in equations(jaxpr)}
    if "conv_general_dilated" not in names:
        return 0
    if names.isdisjoint(("while", "scan", "cond")):
        return steps if steps <= UNROLLED else 0
    return 1


def _accumulator(a: Any, b: Any) -> Any:
    return jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)


def _dot(a: Any, b: Any) -> jax.Array:
    dtype = _accumulator(a, b)
    if explicitly_sharded(a):  # a contraction of sharded axes would have to be told the sharding of its result
        return jnp.sum(a.astype(dtype) * b.astype(dtype))
    return jnp.vdot(a.astype(dtype), b.astype(dtype), precision=lax.Precision.HIGHEST)


def _project(s: Any, a: Any) -> jax.Array:
    dtype = _accumulator(s, a)
    if explicitly_sharded(a):
        return jnp.sum(s.astype(dtype) * a.astype(dtype), axis=tuple(range(1, s.ndim)))
    return jnp.matmul(
        s.reshape(len(s), a.size).astype(dtype), a.reshape(-1).astype(dtype), precision=lax.Precision.HIGHEST
    )


def _stack(items: Sequence[Any]) -> tuple[list[Callable[[Any], Any]], Any]:
    """Return, for each leaf, a function from an item's number to its leaf, and the structure of an item."""
    paths, structure = jax.tree_util.tree_flatten_with_path(items[0])
    columns = [[leaf] for _, leaf in paths]
    for i, item in enumerate(items[1:], 1):
        leaves, other = jax.tree.flatten(item)
        if other != structure:
            raise ValueError(f"batch {i} has the structure {other}, but batch 0 {structure}.")
        for column, leaf in zip(columns, leaves, strict=True):
            column.append(leaf)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    return [_stack_leaf(name, column) for name, column in zip(names, columns, strict=True)], structure


def _stack_leaf(name: str, parts: Sequence[Any]) -> Callable[[Any], Any]:
    first = parts[0]
    if not hasattr(first, "shape") and all(type(part) is type(first) and part == first for part in parts[1:]):
        return lambda i: first  # stays the Python value that it is: a flag, a size
    for i, part in enumerate(parts):
        if isinstance(part, str | bytes) or not (hasattr(part, "shape") or isinstance(part, bool | int | float)):
            raise TypeError(f"leaf {name} of the batches is no number or array, and not the same in all: {part!r}.")
        (shape, dtype), (shape0, dtype0) = ((jnp.shape(x), jnp.result_type(x)) for x in (part, first))
        if (shape, dtype) != (shape0, dtype0):
            raise ValueError(
                f"leaf {name} is {dtype} of shape {shape} in batch {i}, but {dtype0} of shape {shape0} in batch 0. "
                "A compiled loop needs batches that are alike: drop the odd one, or pad it."
            )
    stacked = jnp.stack(parts)
    return lambda i: stacked[i]
