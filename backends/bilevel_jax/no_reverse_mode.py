"""An identity without a reverse mode. JAX's own error would name a loop that the user did not write."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel.spaces.array import V


def without_reverse_mode(tree: V) -> V:
    """Return a tree unchanged. JAX differentiates the result in forward mode only."""
    return jax.tree.map(_identity.bind, tree)


def raise_no_derivative(*_: object) -> Any:
    """Raise a NotImplementedError, in place of a rule for derivatives."""
    raise NotImplementedError(
        "bl.hypergradient cannot be differentiated here: JAX has no reverse mode for the loop of a solver, and no "
        'derivative of the computation of "exact" on the host. Use bilevel_jax.implicit_minimizer, which has '
        "derivatives of all orders."
    )


_identity = Primitive("forward_only")
_identity.def_impl(lambda x: x)
_identity.def_abstract_eval(lambda x: x)
ad.deflinear2(_identity, raise_no_derivative)
batching.defvectorized(_identity)
mlir.register_lowering(_identity, lambda context, x: [x])
