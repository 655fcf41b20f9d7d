"""An identity without a reverse mode, which says so in words of its own: JAX's are about a loop that no user wrote."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def without_reverse_mode(tree: Any) -> Any:
    """Return a tree as it is, which JAX differentiates in forward mode alone."""
    return jax.tree.map(_identity.bind, tree)


def raise_no_derivative(*_: Any) -> Any:
    """Raise: the rule for a derivative that there is not."""
    raise NotImplementedError(
        "bl.hypergradient has no derivative of its own here: JAX has no reverse mode for the loop of a solver, and "
        'none at all for what "exact" does on the host. Use bilevel_jax.implicit_minimizer, which has derivatives of '
        "all orders."
    )


_identity = Primitive("forward_only")
_identity.def_impl(lambda x: x)
_identity.def_abstract_eval(lambda x: x)
ad.deflinear2(_identity, raise_no_derivative)
batching.defvectorized(_identity)
mlir.register_lowering(_identity, lambda context, x: [x])
