"""Read off the trace of a function whether it uses its argument."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from bilevel.spaces.array import V


def depends(function: Callable[[V], object], x: V) -> bool:
    """Return whether function(x) can depend on x.

    The data are followed through the trace, also into jitted functions. All outputs of a loop or branch count as
    dependent on all its inputs, so the result can be True in error. A dependence through integers or
    `jax.lax.stop_gradient` does not count.
    """
    return reaches(trace(function, x))


def trace(function: Callable[[V], object], x: V) -> Jaxpr:
    """Return the jaxpr of a function at x."""
    return jax.make_jaxpr(function)(x).jaxpr


def reaches(jaxpr: Jaxpr) -> bool:
    """Return whether an output can depend on an input."""
    return any(_reach(jaxpr, [True] * len(jaxpr.invars)))


def _reach(jaxpr: Jaxpr, inputs: list[bool]) -> list[bool]:
    """Return which outputs can depend on the marked inputs."""
    reached = {v for v, marked in zip(jaxpr.invars, inputs, strict=True) if marked}

    def marked(variables: Sequence[Any]) -> list[bool]:
        # A literal has no identity to follow and may not be hashable.
        return [not hasattr(v, "val") and v in reached for v in variables]

    for equation in jaxpr.eqns:
        into = marked(equation.invars)
        if not any(into):
            continue
        if equation.primitive.name in ("jit", "pjit"):
            out = _reach(equation.params["jaxpr"].jaxpr, into)
        elif equation.primitive.name == "stop_gradient":
            continue
        else:  # an integer or a flag has no derivative
            out = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]  # pyright: ignore
        reached.update(v for v, hit in zip(equation.outvars, out, strict=True) if hit)
    return marked(jaxpr.outvars)
