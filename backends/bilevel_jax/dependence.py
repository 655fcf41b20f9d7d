"""Read off the trace of a function whether it uses its arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from bilevel.linearization import Dependence


def trace(function: Callable[..., object], *args: object) -> Jaxpr:
    """Return the jaxpr of a function of trees of arrays."""
    return jax.make_jaxpr(function)(*args).jaxpr


def dependence(jaxpr: Jaxpr, params: object) -> Dependence:
    """Return on which leaves a traced function of (params, hparams) can depend.

    The data are followed through the trace, also into jitted functions. All outputs of a loop or branch count as
    dependent on all its inputs, so a result can be True in error. A dependence through integers or
    `jax.lax.stop_gradient` does not count.
    """
    outputs = _reach(jaxpr, [1 << i for i in range(len(jaxpr.invars))])
    reaching = _union(outputs)
    found = [bool(reaching >> i & 1) for i in range(len(jaxpr.invars))]
    count = len(jax.tree.leaves(params))
    return Dependence(found[:count], found[count:])


def _reach(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """Return the set of inputs that can reach each output. A set is an integer with one bit per input."""
    reached: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def sets(variables: Sequence[Any]) -> list[int]:
        # A literal has no identity to follow and may not be hashable.
        return [0 if hasattr(v, "val") else reached.get(v, 0) for v in variables]

    for equation in jaxpr.eqns:
        into = sets(equation.invars)
        if not any(into) or equation.primitive.name == "stop_gradient":
            continue
        if equation.primitive.name in ("jit", "pjit"):
            out = _reach(equation.params["jaxpr"].jaxpr, into)
        else:  # an integer or a flag has no derivative
            every = _union(into)
            out = [every if jnp.issubdtype(v.aval.dtype, jnp.inexact) else 0 for v in equation.outvars]  # pyright: ignore
        reached.update(zip(equation.outvars, out, strict=True))
    return sets(jaxpr.outvars)


def _union(sets: Sequence[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union
