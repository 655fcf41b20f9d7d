"""Pytrees as vectors, and `jax.lax` loops, so that a whole hypergradient compiles."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from typing_extensions import override

from bilevel.spaces.array import Array, V
from bilevel.spaces.jax_callback import jax_callback
from bilevel.spaces.space import Layout, Space, State, X, kind_of
from bilevel_jax.no_reverse_mode import raise_no_derivative, without_reverse_mode
from bilevel_jax.sharding import equations, explicitly_sharded

UNROLLED = 20  # steps: as many as neumann's default terms; each step adds to the time of compilation


class JaxSpace(Space[V]):
    """See `bilevel.spaces.space.Space`."""

    xp = jnp

    @override
    def leaves(self, x: object) -> list[Any]:
        return jax.tree.leaves(x)

    @override
    def map(self, function: Callable[..., Any], x: X, *rest: object) -> X:
        return jax.tree.map(lambda a, *others: self.cast(function(a, *others), a), x, *rest)

    @override
    def layout(self, x: object) -> Layout:
        flat = jax.tree_util.tree_flatten_with_path(x)[0]
        return {jax.tree_util.keystr(path): kind_of(leaf) for path, leaf in flat}

    @override
    def dot(self, x: V, y: V) -> Any:
        return _sum(jax.tree.leaves(jax.tree.map(_dot, x, y)))

    @override
    def normal(self, seed: int, count: int | None = None) -> Any:
        leaves, structure = jax.tree.flatten(self.like if count is None else self.stack(count))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        # Here and below, zeros like the leaf give the result its type: sharded, or varying over a shard_map's axes.
        draws = [jnp.zeros_like(a) + jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, draws)

    @override
    def max_abs(self, x: V) -> Any:
        parts = [jnp.max(jnp.abs(leaf), initial=0).astype(_accumulator(leaf, leaf)) for leaf in jax.tree.leaves(x)]
        dtype = jnp.result_type(*(part.dtype for part in parts))
        return jnp.stack(jnp.broadcast_arrays(*(part.astype(dtype) for part in parts))).max()

    @override
    def ravel(self, x: object) -> jax.Array:
        return ravel_pytree(x)[0]

    @override
    def unravel(self, array: jax.Array) -> V:
        flat, unravel = ravel_pytree(self.like)
        return unravel(array.astype(flat.dtype))

    @override
    def stack(self, count: int) -> Any:
        return jax.tree.map(lambda a: jnp.broadcast_to(jnp.zeros_like(a), (count, *a.shape)), self.like)

    @override
    def set(self, stack: Any, i: Any, x: V) -> Any:
        return jax.tree.map(lambda s, a: s.at[i].set(a), stack, x)

    @override
    def get(self, stack: Any, i: Any) -> V:
        return jax.tree.map(lambda s: s[i], stack)

    @override
    def stack_dot(self, stack: object, x: V) -> Any:
        return _sum(jax.tree.leaves(jax.tree.map(_rows_dot, stack, x)))

    @override
    def linear_combination(self, coefficients: Any, stack: Any) -> V:
        return jax.tree.map(
            lambda s: jnp.tensordot(coefficients.astype(s.dtype), s, 1, precision=lax.Precision.HIGHEST), stack
        )

    @override
    def gram(self, rows: Any, others: Any) -> Any:
        return jax.vmap(lambda row: self.stack_dot(others, row))(rows)

    @override
    def combine(self, matrix: Any, rows: Any) -> Any:
        return jax.vmap(lambda coefficients: self.linear_combination(coefficients, rows))(matrix)

    @override
    def while_loop(
        self, live: Callable[[State], Any], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        # A float of Python would get JAX's default dtype, and no axis of a shard_map. Scalars of this space have both.
        if any(isinstance(x, float) for x in jax.tree.leaves(state)):
            scalar = self.dot(self.like, self.like)
            state = jax.tree.map(lambda x: jnp.full_like(scalar, x) if isinstance(x, float) else x, state)
        # These steps do not read the flag: a body changes nothing when its flag is down.
        unrolled = 1 if max_steps == 1 else min(max_steps, _steps_outside(body, state, max_steps))
        for _ in range(unrolled):
            state = body(state)
        max_steps -= unrolled
        if not max_steps:
            return state

        def counted_live(carry: tuple[jax.Array | int, State]) -> Any:
            return (carry[0] < max_steps) & live(carry[1])

        def counted_body(carry: tuple[jax.Array | int, State]) -> tuple[jax.Array | int, State]:
            return carry[0] + 1, body(carry[1])

        with in_loop():
            return without_reverse_mode(lax.while_loop(counted_live, counted_body, (0, state))[1])

    @override
    def scan(
        self,
        body: Callable[[State, Any], tuple[State, Any]],
        state: State,
        xs: Any,
        length: int,
        reverse: bool = False,
    ) -> tuple[State, Any]:
        first = None if xs is None else jax.tree.map(lambda a: a[0], xs)
        unroll = 0 < length == _steps_outside(lambda s: body(s, first), state, length)
        with nullcontext() if unroll else in_loop():
            return lax.scan(body, state, xs, length=length, reverse=reverse, unroll=unroll)

    @override
    def cond(self, flag: Array, body: Callable[[State], State], state: State) -> State:
        return lax.cond(flag, body, lambda s: s, state)

    @override
    def sequence(self, items: Sequence[X]) -> Callable[[Any], X]:
        if len(items) == 1:
            return lambda i: items[0]
        count = len(items)
        leaves, structure = _stack(items)
        return lambda i: jax.tree.unflatten(structure, [leaf(i % count) for leaf in leaves])

    @override
    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: jax.Array) -> jax.Array:
        like = arrays[-1]

        def call(*host: np.ndarray) -> np.ndarray:
            return function(*(a.astype(np.float64) for a in host))

        @jax.custom_jvp
        def without_derivative(*arrays: jax.Array) -> jax.Array:
            return jax_callback(call, like, *arrays)

        without_derivative.defjvp(raise_no_derivative)
        return jnp.zeros_like(like) + without_derivative(*arrays)

    @override
    def materialise(self, operator: Callable[[V], V]) -> jax.Array:
        flat, unravel = ravel_pytree(self.like)
        return lax.map(lambda e: self.ravel(operator(unravel(e))), jnp.diag(jnp.ones_like(flat))).T


_looping: ContextVar[bool] = ContextVar("whether the body of a loop is being traced", default=False)


@contextmanager
def in_loop() -> Iterator[None]:
    """Trace the body of a loop in this context, so that no loop inside of it is unrolled."""
    before = _looping.set(True)
    try:
        yield
    finally:
        _looping.reset(before)


def _steps_outside(body: Callable[[X], object], state: X, steps: int) -> int:
    """Return the number of steps to take before a loop, if the loop has a convolution and runs on a CPU.

    XLA's CPU code for the derivatives of a convolution is about ten times as slow inside a loop as outside (jax#12868).
    So a short loop is unrolled, unless it is inside another loop. If a loop contains another loop, as the sweeps of an
    iterative solver do, its first step is taken outside, and the inner loop of that step is treated in the same way.
    """
    if _looping.get() or jax.default_backend() != "cpu":
        return 0
    with in_loop():
        jaxpr = jax.make_jaxpr(body)(state).jaxpr
    names = {equation.primitive.name for equation in equations(jaxpr)}
    if "conv_general_dilated" not in names:
        return 0
    if names.isdisjoint(("while", "scan", "cond")):
        return steps if steps <= UNROLLED else 0
    return 1


def _sum(parts: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of arrays in the widest of their dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.add, parts)


def _accumulator(a: jax.Array, b: jax.Array) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # also if the caller has set "strict"
        return jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = _accumulator(a, b)
    if explicitly_sharded(a):  # a contraction of sharded axes needs the sharding of its result as an argument
        return jnp.sum(a.astype(dtype) * b.astype(dtype))
    return jnp.vdot(a.astype(dtype), b.astype(dtype), precision=lax.Precision.HIGHEST)


def _rows_dot(s: jax.Array, a: jax.Array) -> jax.Array:
    dtype = _accumulator(s, a)
    if explicitly_sharded(a):
        return jnp.sum(s.astype(dtype) * a.astype(dtype), axis=tuple(range(1, s.ndim)))
    return jnp.matmul(
        s.reshape(len(s), a.size).astype(dtype), a.reshape(-1).astype(dtype), precision=lax.Precision.HIGHEST
    )


def _stack(items: Sequence[object]) -> tuple[list[Callable[[Any], object]], Any]:
    """Return a function from the number of an item to its leaf, for each leaf, and the structure of an item."""
    paths, structure = jax.tree_util.tree_flatten_with_path(items[0])
    for i, item in enumerate(items):
        if (other := jax.tree.structure(item)) != structure:
            raise ValueError(f"batch {i} has the structure {other}, but batch 0 has the structure {structure}.")
    columns = zip(*map(jax.tree.leaves, items), strict=True)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    return [_stack_leaf(name, column) for name, column in zip(names, columns, strict=True)], structure


def _stack_leaf(name: str, parts: Sequence[Any]) -> Callable[[Any], object]:
    first = parts[0]
    if not hasattr(first, "shape") and all(type(part) is type(first) and part == first for part in parts[1:]):
        return lambda i: first  # stays a Python value: a flag, a size
    for i, part in enumerate(parts):
        if isinstance(part, str | bytes) or not (hasattr(part, "shape") or isinstance(part, bool | int | float)):
            raise TypeError(f"leaf {name} of the batches is not a number or array, and it differs: {part!r}.")
        (shape, dtype), (shape0, dtype0) = ((jnp.shape(x), jnp.result_type(x)) for x in (part, first))
        if (shape, dtype) != (shape0, dtype0):
            raise ValueError(
                f"leaf {name} is {dtype} of shape {shape} in batch {i}, but {dtype0} of shape {shape0} in batch 0. "
                "A compiled loop needs batches of equal shapes and dtypes: drop the odd batch, or pad it."
            )
    stacked = jnp.stack(parts)
    return lambda i: stacked[i]
