"""Arrays that differ from device to device: what their types say, and where no derivative would be right."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
from jax import lax, typeof

# With them in a loss, JAX without its types of varying values differentiates wrongly.
COLLECTIVES = ("psum", "pmax", "pmin", "ppermute", "all_gather", "all_to_all", "reduce_scatter", "psum_scatter")


@lru_cache(maxsize=128)
def devices_of(sharding: Any) -> str:
    """Return the names of the devices that an array is on."""
    return ", ".join(f"{d.platform}:{d.id}" for d in sorted(sharding.device_set, key=lambda d: d.id))


def explicitly_sharded(x: Any) -> bool:
    """Tell whether an array is sharded over Explicit axes of a mesh."""
    return any(axis is not None for axis in typeof(x).sharding.spec)


def check_alike(role: str, value: Any, params: Any, hparams: Any) -> None:
    """Raise unless it is clear, inside a ``shard_map``, what the derivative of a loss on each device is.

    A loss that is the same on all devices has one derivative, and one that differs has one per device; then it takes
    params and hparams per device, since JAX adds up the derivatives by what is the same on all. Dot products are each
    device's own, so params must not be in pieces.

    Raises:
        ValueError: naming the mesh axis and the leaf.
    """
    loss_axes = frozenset().union(*map(_varying, jax.tree.leaves(value)))
    for name, tree in (("params", params), ("hparams", hparams)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            where, axes = name + jax.tree_util.keystr(path), _varying(leaf)
            for axis in sorted(map(str, loss_axes - axes)):
                raise ValueError(
                    f"{role} differs along the mesh axis {axis!r}, but {where} is the same there, so that JAX would "
                    f"add up its derivatives. Average inside {role}, as in jax.lax.pmean(loss, {axis!r}); or, for a "
                    f"problem per device, let {where} differ, too: jax.lax.pcast(..., {axis!r}, to='varying')."
                )
            for axis in sorted(map(str, axes - loss_axes)) if name == "params" else ():
                raise ValueError(
                    f"{where} differs along the mesh axis {axis!r}, but {role} is the same there: a solver inside "
                    "shard_map would see each device's piece of params alone. Use jax.jit on arrays with a "
                    "NamedSharding, outside shard_map, where XLA knows of the pieces."
                )


def check_collectives(role: str, jaxpr: Any) -> None:
    """Raise if a loss has a collective over an axis whose varying values JAX does not track.

    Raises:
        ValueError: naming the axis.
    """
    for equation in equations(jaxpr):
        if equation.primitive.name.removesuffix("_invariant") not in COLLECTIVES:
            continue
        names = equation.params.get("axes", equation.params.get("axis_name", ()))
        for axis in names if isinstance(names, tuple) else (names,):
            if isinstance(axis, str) and axis not in _varying(lax.axis_index(axis)):
                raise ValueError(
                    f"{role}: {equation.primitive.name} over the axis {axis!r} is differentiated rightly only inside "
                    "jax.shard_map with check_vma=True, its default; with check_vma=False, and in vmap and pmap, the "
                    "products of each device would stay its own. Or use jax.jit on arrays with a NamedSharding."
                )


def unvarying(tree: Any, like: Any) -> Any:
    """Return a tree whose leaves vary like those of another, where JAX has lost sight of their being the same."""

    def average(leaf: Any, other: Any) -> Any:
        axes = tuple(_varying(leaf) - _varying(other))
        return lax.pmean(leaf, axes) if axes else leaf

    return jax.tree.map(average, tree, like)


def _varying(x: Any) -> frozenset[Any]:
    """Return the mesh axes of a ``shard_map`` along which a value may differ."""
    kind = typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))  # vma: JAX 0.7 to 0.9


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr, and of those in it."""
    for equation in jaxpr.eqns:
        if "mesh" in equation.params:  # a shard_map of the loss's own, with axes of its own
            continue
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
