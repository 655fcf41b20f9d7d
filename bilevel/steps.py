"""Training steps of a framework with their derivatives, and the leaves that derivatives flow through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bilevel.spaces.array import V

if TYPE_CHECKING:
    from bilevel.backend import Backend

PLAIN = (bool, int, float, str)
"""The types of the leaves of a state that are no arrays and may change from step to step."""


class Pulled(NamedTuple):
    """A cotangent of a state, pulled back through some steps.

    Attributes:
        state: the cotangents of the floating-point leaves of the first state.
        hparams: the cotangents of the leaves of hparams. None: the steps do not depend on the leaf.
    """

    state: list[Any]
    hparams: list[Any | None]


Pull = Callable[[list[Any], bool], Pulled]
"""A function of a cotangent, and of whether it has a leading axis."""


class Steps(ABC):
    """Consecutive steps state ← step(state, hparams, batch), with values and derivatives.

    A cotangent of a state is a list of arrays, one for each floating-point leaf. With ``many``, each array has a
    leading axis, and all rows are pulled back.
    """

    def start(self, state: Any) -> Any:
        """Return the first state of a run, with arrays in place of values that are no constants."""
        return state

    @abstractmethod
    def advance(self, state: Any, hparams: Any, batches: Sequence[Any]) -> Any:
        """Return the state after one step for each batch. Leave the given state as it is."""
        raise NotImplementedError

    @abstractmethod
    def record(self, state: Any, hparams: Any, batches: Sequence[Any]) -> tuple[Any, Pull]:
        """Return the state after one step for each batch, and a function that pulls a cotangent of it back."""
        raise NotImplementedError

    def pull_back(self, state: Any, hparams: Any, batches: Sequence[Any], cotangent: list[Any], many: bool) -> Pulled:
        """Pull a cotangent back through the steps from a state."""
        return self.record(state, hparams, batches)[1](cotangent, many)

    @abstractmethod
    def graph_bytes(self, state: Any, hparams: Any, batch: Any) -> int:
        """Return about how many bytes `record` keeps for each step."""
        raise NotImplementedError

    def random_state(self) -> Any:
        """Return the state of global random generators, a tree of arrays. None: steps do not use them."""
        return None

    def set_random_state(self, state: Any) -> None:  # noqa: B027  (frameworks without such generators need nothing)
        """Restore what `random_state` has returned."""


def add(totals: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
    """Add two lists of arrays. None, or an empty list, stands for zeros."""
    if not totals or not parts:
        return list(totals or parts)
    return [a if b is None else b if a is None else a + b for a, b in zip(totals, parts, strict=True)]


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
