"""Micro-batches in compiled code: one loop for all that have equal shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel.micro_batches import MicroBatches, axes, examples
from bilevel.spaces.array import Args, Number
from bilevel.spaces.space import State, kind_of
from bilevel_jax.partition import split_arrays
from bilevel_jax.space import JaxSpace, in_loop


def fold(batches: MicroBatches, body: Callable[[State, Args, Number], State], state: State) -> tuple[State, Number]:
    """See `bilevel.backend.Backend.fold`.

    No loop is unrolled, not even for convolutions on a CPU: XLA may compute unrolled micro-batches at the same time.
    """
    total = 0
    for batch, weights in _sliced(batches) if batches.size else _grouped(batches):
        if len(weights) == 1:
            # XLA would move the gradient of a single micro-batch out of a solver's loop, and keep its graph in memory.
            arrays, rest = split_arrays(batch(0))
            arrays, state = lax.optimization_barrier((arrays, state))
            state = body(state, rest.join(arrays), weights[0])
        else:
            with in_loop():
                xs = jnp.arange(len(weights)), jnp.asarray(weights)
                state, _ = lax.scan(lambda s, x, at=batch: (body(s, at(x[0]), x[1]), None), state, xs)
        total = total + sum(weights)
    return state, total


Group = tuple[Callable[[Any], Any], Sequence[Number]]
"""A function from the number of a micro-batch to the micro-batch, and their weights."""


def _sliced(batches: MicroBatches) -> Iterator[Group]:
    """Yield the micro-batches of whole arrays, without a copy of the arrays. The last one may have another size."""
    count, size = examples(batches.data), batches.size
    assert size is not None
    weights = [weight for _, weight in batches.parts()]

    def at(start: Any, length: int) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, length) if axes(a) else a, batches.data)

    full = count // size
    if full:
        yield lambda i: at(i * size, size), weights[:full]
    if full < len(weights):
        yield lambda _: at(full * size, count - full * size), weights[full:]


def _grouped(batches: MicroBatches) -> Iterator[Group]:
    """Yield the micro-batches of a list by structure, shapes, dtypes and Python values.

    Each group is stacked, in a copy.
    """
    groups: dict[Any, list[tuple[Args, Number]]] = {}
    for args, weight in batches.parts():
        leaves, structure = jax.tree.flatten(args)
        kinds = [kind_of(leaf) if hasattr(leaf, "shape") else (type(leaf), leaf) for leaf in leaves]
        groups.setdefault((structure, *kinds), []).append((args, weight))
    for group in groups.values():
        items, weights = zip(*group, strict=True)
        yield JaxSpace(None).sequence(items), weights
