"""Whether a function uses its argument at all, read off its trace."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def depends(function: Callable[[Any], Any], x: Any) -> bool:
    """Tell whether function(x) can depend on x.

    Follows the data through the trace, into jitted functions too. A loop or branch counts as depending on all that
    enters it: the answer errs towards True. What passes through integers or `jax.lax.stop_gradient` does not depend.
    """
    return reaches(trace(function, x))


def trace(function: Callable[[Any], Any], x: Any) -> Any:
    """Return the jaxpr of a function at x."""
    return jax.make_jaxpr(function)(x).jaxpr


def reaches(jaxpr: Any) -> bool:
    """Tell whether an output can depend on an input."""
    return any(_reach(jaxpr, [True] * len(jaxpr.invars)))


def _reach(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Tell which outputs can depend on the inputs that are marked."""
    reached = {v for v, marked in zip(jaxpr.invars, inputs, strict=True) if marked}

    def marked(variables: Any) -> list[bool]:
        # A literal has no identity to follow, and may not be hashable.
        return [not hasattr(v, "val") and v in reached for v in variables]

    for equation in jaxpr.eqns:
        into = marked(equation.invars)
        if not any(into):
            continue
        if equation.primitive.name in ("jit", "pjit"):
            out = _reach(equation.params["jaxpr"].jaxpr, into)
        elif equation.primitive.name == "stop_gradient":
            continue
        else:  # what is no real number has no derivative
            out = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]
        reached.update(v for v, hit in zip(equation.outvars, out, strict=True) if hit)
    return marked(jaxpr.outvars)
