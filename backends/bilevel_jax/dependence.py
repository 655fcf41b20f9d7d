"""Whether a function uses its argument at all, read off its trace."""

from collections.abc import Callable
from typing import Any

import jax


def depends(function: Callable[[Any], Any], x: Any) -> bool:
    """Tell whether function(x) can depend on x.

    Follows the data through the trace. A nested call (jit, scan, cond) counts as depending on all that enters
    it: the answer errs towards True.
    """
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        # A literal has no identity to follow, and may not be hashable.
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return any(not hasattr(v, "val") and v in reached for v in jaxpr.outvars)
