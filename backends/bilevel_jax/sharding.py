"""Checks of arrays that differ from device to device."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
from jax import lax, typeof
from jax.extend.core import Jaxpr, JaxprEqn

from bilevel.spaces.array import V

# JAX differentiates a loss with these wrongly, unless it tracks which values vary.
COLLECTIVES = ("psum", "pmax", "pmin", "ppermute", "all_gather", "all_to_all", "reduce_scatter", "psum_scatter")


@lru_cache(maxsize=128)
def devices_of(sharding: jax.sharding.Sharding) -> str:
    """Return the names of the devices of an array."""
    return ", ".join(f"{d.platform}:{d.id}" for d in sorted(sharding.device_set, key=lambda d: d.id))


def explicitly_sharded(x: jax.Array) -> bool:
    """Return whether an array is sharded over Explicit axes of a mesh."""
    return any(axis is not None for axis in typeof(x).sharding.spec)


def check_alike(role: str, value: object, params: object, hparams: object) -> None:
    """Raise if the derivative of a loss on each device is ambiguous inside a ``shard_map``.

    A loss that is the same on all devices has one derivative. A loss that differs has one derivative per device. Then
    params and hparams must also differ per device, because JAX sums the derivatives by a leaf that is the same on all
    devices. Each device computes its own dot products, so params must not be in pieces.

    Raises:
        ValueError: naming the mesh axis and the leaf.
    """
    loss_axes = frozenset().union(*map(varying, jax.tree.leaves(value)))
    for name, tree in (("params", params), ("hparams", hparams)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            where, axes = name + jax.tree_util.keystr(path), varying(leaf)
            for axis in sorted(map(str, loss_axes - axes)):
                raise ValueError(
                    f"{role} differs along the mesh axis {axis!r}, but {where} is the same there, so JAX would sum "
                    f"its derivatives. Average inside {role}, as in jax.lax.pmean(loss, {axis!r}). For one problem "
                    f"per device, let {where} differ too: jax.lax.pcast(..., {axis!r}, to='varying')."
                )
            for axis in sorted(map(str, axes - loss_axes)) if name == "params" else ():
                raise ValueError(
                    f"{where} differs along the mesh axis {axis!r}, but {role} is the same there: a solver inside "
                    "shard_map would receive only each device's piece of params. Use jax.jit on arrays with a "
                    "NamedSharding, outside shard_map."
                )


def check_collectives(role: str, jaxpr: Jaxpr) -> None:
    """Raise if a loss has a collective over an axis for which JAX does not track varying values.

    Raises:
        ValueError: naming the axis.
    """
    for equation in equations(jaxpr):
        if equation.primitive.name.removesuffix("_invariant") not in COLLECTIVES:
            continue
        names = equation.params.get("axes", equation.params.get("axis_name", ()))
        for axis in names if isinstance(names, tuple) else (names,):
            if isinstance(axis, str) and axis not in varying(lax.axis_index(axis)):
                raise ValueError(
                    f"{role}: JAX differentiates {equation.primitive.name} over the axis {axis!r} correctly only "
                    "inside jax.shard_map with check_vma=True, the default. With check_vma=False, vmap or pmap, the "
                    "products would differ per device. Or use jax.jit on arrays with a NamedSharding."
                )


def unvarying(tree: V, like: V) -> V:
    """Return a tree whose leaves vary as the leaves of ``like``: average over axes that JAX wrongly takes to vary."""

    def average(leaf: jax.Array, other: jax.Array) -> jax.Array:
        axes = tuple(varying(leaf) - varying(other))
        return lax.pmean(leaf, axes) if axes else leaf

    return jax.tree.map(average, tree, like)


def varying(x: object) -> frozenset[Any]:
    """Return the mesh axes of a ``shard_map`` along which a value may differ."""
    kind = typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))  # vma: JAX 0.7 to 0.9


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of a jaxpr and of the jaxprs in it."""
    for equation in jaxpr.eqns:
        if "mesh" in equation.params:  # a shard_map inside the loss, with other axes
            continue
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
