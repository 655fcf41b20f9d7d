"""The part of a DTensor on this rank. To import `DTensor` would double the time to import this package."""

from math import prod
from typing import Any

import torch

from bilevel.spaces.array import V
from bilevel.spaces.tree import leaves, tree_map, with_leaves


def is_dtensor(value: object) -> bool:
    """Return whether a value is a DTensor."""
    return type(value).__name__ == "DTensor"


def local(t: Any) -> Any:
    """Return the part of a DTensor on this rank, without a graph, in the same memory; any other value as it is."""
    return t.detach().to_local() if is_dtensor(t) else t


def local_tree(tree: V) -> V:
    """Return a tree with the parts of its leaves on this rank."""
    return tree_map(local, tree)


def wrapped(part: torch.Tensor, t: Any) -> Any:
    """Return the DTensor of the layout of t with a part on this rank. If t is no DTensor, return the part."""
    if not is_dtensor(t):
        return part
    # Without the shape, ranks with parts of different sizes would compute different shapes.
    return type(t).from_local(part, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


def wrapped_tree(parts: Any, tree: V) -> V:
    """Return a tree of the layout of another with parts on this rank."""
    return with_leaves(tree, [wrapped(part, t) for part, t in zip(leaves(parts), leaves(tree), strict=True)])


def is_split(placement: Any) -> bool:
    """Return whether a placement divides a tensor among ranks."""
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


def pieces(t: Any) -> int:
    """Return the number of parts that a tensor is divided into."""
    if not is_dtensor(t):
        return 1
    return prod(t.device_mesh.size(dim) for dim, placement in enumerate(t.placements) if is_split(placement))


def placed(t: Any, target: Any) -> Any:
    """Return a tensor with the placements of another."""
    if not is_dtensor(t) or not is_dtensor(target) or t.placements == target.placements:
        return t
    return t.redistribute(placements=target.placements)


def layout_of(t: Any) -> str:
    """Return the mesh and the placements of a DTensor as text; "" for any other tensor."""
    return f"{tuple(t.device_mesh.shape)} {t.placements}" if is_dtensor(t) else ""
