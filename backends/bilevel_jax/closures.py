"""Make the traced values that a loss or a solver captures into arguments.

A rule for derivatives must not capture traced values: JAX would treat them as constants, or raise an error for a leak.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
from jax.core import Tracer
from jax.extend.core import Jaxpr

from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.validation import check_scalar
from bilevel_jax.partition import Static, combine, partition


class Call(NamedTuple):
    """The further arguments of a loss, by position and by keyword."""

    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class Plain(Static):
    """(w, λ, call, captured) -> L, for an ``inner`` that captures no traced values."""

    inner: Callable[..., object]

    def __call__(self, params: object, hparams: object, call: Call, captured: list[jax.Array]) -> object:
        return self.inner(params, hparams, *call.args, **call.named)


@dataclass(frozen=True)
class Moving(Static):
    """L as a function of w and of the other leaves that move, given by their places. The key of a cached jit."""

    loss: Callable[..., object]
    structure: Any
    places: tuple[int, ...]

    def __call__(self, params: object, moving: list[jax.Array], constants: Sequence[object]) -> object:
        leaves = list(constants)
        for i, leaf in zip(self.places, moving, strict=True):
            leaves.insert(i, leaf)
        hparams, call, captured, _ = jax.tree.unflatten(self.structure, leaves)
        return self.loss(params, hparams, call, captured)


class Uncovered(NamedTuple):
    """L as a function that also takes the traced values that ``inner`` captures, these values, and the trace of L."""

    loss: Callable[..., object]
    captured: list[jax.Array]
    jaxpr: Jaxpr


def uncover(inner: Callable[..., object], params: object, hparams: object, call: Call) -> Uncovered:
    """Find the traced values that ``inner`` captures."""

    def split(hparams: object, call: Call) -> tuple[list[jax.Array], list[object], Any]:
        leaves, structure = jax.tree.flatten((hparams, call))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return arrays, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves], structure

    arrays, others, structure = split(hparams, call)

    def of_arrays(params: object, arrays: list[jax.Array]) -> object:
        supply = iter(arrays)
        hparams, call = jax.tree.unflatten(structure, [next(supply) if x is None else x for x in others])
        value = inner(params, hparams, *call.args, **call.named)
        check_scalar("inner", value)
        return value

    closed = jax.make_jaxpr(of_arrays)(params, arrays)
    traced = [isinstance(const, Tracer) for const in closed.consts]
    if not any(traced):
        return Uncovered(Plain(inner), [], closed.jaxpr)

    def loss(params: object, hparams: object, call: Call, captured: list[jax.Array]) -> object:
        supply = iter(captured)
        consts = [next(supply) if t else const for t, const in zip(traced, constants, strict=True)]
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((params, split(hparams, call)[0])))[0]

    constants = [None if t else const for t, const in zip(traced, closed.consts, strict=True)]
    return Uncovered(loss, [const for t, const in zip(traced, closed.consts, strict=True) if t], closed.jaxpr)


def uncover_options(
    solver: LinearSolver[object],
) -> tuple[Callable[[list[object]], LinearSolver[object]], list[object]]:
    """Return the solver as a function of its options, and the options if some are traced."""
    options: list[object] = []
    try:
        static = partition(solver, options)
    except TypeError:  # the solver cannot be rebuilt
        return lambda _: solver, []
    if not any(isinstance(option, Tracer) for option in options):
        return lambda _: solver, []
    return lambda options: combine(static, iter(options)), options
