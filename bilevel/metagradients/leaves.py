"""The floating-point leaves of a state, which derivatives flow through."""

from typing import Any

from bilevel.backend import Backend
from bilevel.spaces.array import V


def differentiable(backend: Backend, leaf: Any) -> bool:
    """Return whether derivatives flow through a leaf."""
    return backend.owns(leaf) and backend.is_floating(leaf)


def floats_of(backend: Backend, tree: Any) -> list[Any]:
    """Return the floating-point leaves of a tree."""
    return [leaf for _, leaf in backend.leaves(tree) if differentiable(backend, leaf)]


def masked(backend: Backend, tree: V) -> V:
    """Return a tree with None in place of all leaves that are no floating-point arrays."""
    return backend.map(lambda leaf: leaf if differentiable(backend, leaf) else None, tree)


def with_floats(backend: Backend, tree: V, floats: list[Any]) -> V:
    """Return a tree with other floating-point leaves."""
    supply = iter(floats)
    return backend.map(lambda leaf: next(supply) if differentiable(backend, leaf) else leaf, tree)
