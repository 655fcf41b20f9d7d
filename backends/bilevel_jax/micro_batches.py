"""Micro-batches in compiled code: one loop for all that have equal shapes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel.micro_batches import MicroBatches, axes, examples
from bilevel.spaces.array import Args, Number
from bilevel.spaces.space import State, kind_of
from bilevel_jax.space import JaxSpace


def fold(batches: MicroBatches, body: Callable[[State, Args, Number], State], state: State) -> tuple[State, Number]:
    """See `bilevel.backend.Backend.fold`."""
    space, total = JaxSpace(state), 0
    for batch, weights in _sliced(batches) if batches.size else _grouped(batches):
        if len(weights) == 1:
            state = body(state, batch(0), weights[0])
        else:
            xs = jnp.arange(len(weights)), jnp.asarray(weights)
            state, _ = space.scan(lambda s, x, at=batch: (body(s, at(x[0]), x[1]), None), state, xs, len(weights))
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


def _flatten(batches: MicroBatches) -> tuple[Any, Any]:
    key = jax.tree_util.GetAttrKey
    return ((key("data"), batches.data), (key("weights"), batches.weights)), (batches.size, batches.reduction)


def _unflatten(static: tuple[int | None, Any], children: Iterable[Any]) -> MicroBatches:
    data, weights = children
    return MicroBatches(data, *static, weights=weights)


jax.tree_util.register_pytree_with_keys(MicroBatches, _flatten, _unflatten)
