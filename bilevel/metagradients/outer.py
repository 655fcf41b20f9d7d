"""The outer objective of a training run, with its derivatives by the states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bilevel.backend import Backend
from bilevel.spaces.array import Args, Array
from bilevel.steps import floats_of, masked, with_floats


class Outer(NamedTuple):
    """F and its derivatives.

    Attributes:
        value: F, of shape () or (Q,).
        seeds: ∂F/∂(state) for each state, as a list of the floating-point leaves.
        direct: ∂F/∂λ, a tree like hparams. None: F does not depend on λ.
        used: for each leaf of hparams, whether F depends on it.
        weights: for each floating-point leaf of a state, whether F depends on it.
        many: whether F has several values. Then all derivatives have a leading axis.
    """

    value: Array
    seeds: list[list[Any]]
    direct: Any
    used: list[bool]
    weights: list[bool]
    many: bool

    def weights_of(self, floats: list[Any]) -> list[Any]:
        """Return the floating-point leaves of a state that F depends on. The optimizer's state is not among them.

        If F depends on none, return all.
        """
        return [leaf for leaf, used in zip(floats, self.weights, strict=True) if used or not any(self.weights)]


class _Queries(Exception):
    """Tells that the outer objective returns several values."""


def outer_derivatives(
    backend: Backend, outer: Callable[..., Any], states: Sequence[Any], hparams: Any, args: Args, listed: bool
) -> Outer:
    """Evaluate outer(state, hparams, *args), or with ``listed`` outer([state, ...], hparams, *args)."""
    try:
        value, grads, direct, *used = backend.run(_evaluate, outer, list(states), hparams, args, listed, False)
        many = False
    except _Queries:
        value, grads, direct, *used = backend.run(_evaluate, outer, list(states), hparams, args, listed, True)
        many = True
    seeds = [floats_of(backend, grad) for grad in grads]
    of_hparams, of_states = (list(map(bool, flags)) for flags in used)
    count = len(seeds[0])
    weights = [any(of_states[i::count]) for i in range(count)]
    return Outer(value, seeds, direct, of_hparams, weights, many)


def _evaluate(
    backend: Backend, outer: Callable[..., Any], states: list[Any], hparams: Any, args: Args, listed: bool, many: bool
) -> tuple[Any, ...]:
    def whole(floats: Any) -> Any:
        parts = floats if listed else [floats]
        full = [with_floats(backend, a, floats_of(backend, b)) for a, b in zip(states, parts, strict=True)]
        return full if listed else full[0]

    def objective(floats: Any, hparams: Any, *args: Any) -> Any:
        value = outer(whole(floats), hparams, *args)
        if not many and len(getattr(value, "shape", ())) == 1:
            raise _Queries
        return value

    if hasattr(outer, "grad"):  # analytic, for the numpy backend
        objective.grad = lambda floats, hparams, *args: outer.grad(whole(floats), hparams, *args)  # pyright: ignore
    floats = [masked(backend, state) for state in states]
    function = backend.outers if many else backend.outer
    found = function(objective, floats if listed else floats[0], hparams, args)
    grads = found.grad_params if listed else [found.grad_params]
    if found.dependence is not None:
        used = list(found.dependence.hparams), list(found.dependence.params)
    else:
        used = [found.grad_hparams is not None] * len(backend.leaves(hparams)), [True] * len(backend.leaves(grads))
    return found.value, grads, found.grad_hparams, *used
