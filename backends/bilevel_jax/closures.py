"""Make arguments of the traced values that a function closes over, or that a solver has as options.

The rule for a derivative must not close over traced values. JAX would treat them as constants, or raise an error for a
leak.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
from jax.core import Tracer
from jax.extend.core import Jaxpr

from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel_jax.partition import Static, combine, partition, split_arrays


class Call(NamedTuple):
    """The further arguments of a function, by position and by keyword."""

    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class Plain(Static):
    """(w, λ, call, captured) -> function(w, λ, ...), for a function that captures no traced values."""

    function: Callable[..., object]

    def __call__(self, params: object, hparams: object, call: Call, captured: list[jax.Array]) -> object:
        return self.function(params, hparams, *call.args, **call.named)


class Uncovered(NamedTuple):
    """A function that also takes the traced values that it captures, these values, and its trace."""

    function: Callable[..., object]
    captured: list[jax.Array]
    jaxpr: Jaxpr


def uncover(
    function: Callable[..., object], params: object, hparams: object, call: Call, check: Callable[[object], None]
) -> Uncovered:
    """Find the traced values that a function captures, by its trace. ``check`` checks its value."""
    arrays, rest = split_arrays((hparams, call))

    def of_arrays(params: object, arrays: list[jax.Array]) -> object:
        hparams, call = rest.join(arrays)
        value = function(params, hparams, *call.args, **call.named)
        check(value)
        return value

    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(params, arrays)
    captured: list[Any] = [const for const in closed.consts if isinstance(const, Tracer)]
    if not captured:
        return Uncovered(Plain(function), [], closed.jaxpr)
    constants = [None if isinstance(const, Tracer) else const for const in closed.consts]

    def uncovered(params: object, hparams: object, call: Call, captured: list[jax.Array]) -> object:
        supply = iter(captured)
        consts = [next(supply) if const is None else const for const in constants]
        arrays, _ = split_arrays((hparams, call))
        values = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((params, arrays)))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return Uncovered(uncovered, captured, closed.jaxpr)


def uncover_options(
    solver: LinearSolver[object],
) -> tuple[Callable[[list[object]], LinearSolver[object]], list[object]]:
    """Return a function from options to the solver, and its options. Without traced options, the list is empty."""
    options: list[object] = []
    try:
        static = partition(solver, options)
    except TypeError:  # the solver cannot be rebuilt
        return lambda _: solver, []
    if not any(isinstance(option, Tracer) for option in options):
        return lambda _: solver, []
    return lambda options: combine(static, iter(options)), options
