"""The derivative of a minimizer, as a rule for JAX."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0

from bilevel.backend import R
from bilevel.convergence import OnFailure
from bilevel.dependence import warn_of_dependence
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.spaces.array import Args, P, V
from bilevel.validation import leaf_names
from bilevel_jax.backend import JaxBackend, backend
from bilevel_jax.closures import Call, uncover, uncover_options
from bilevel_jax.dependence import dependence, trace
from bilevel_jax.implicit_system import Minimizer
from bilevel_jax.implicit_vjp import with_implicit_vjp
from bilevel_jax.partition import split_arrays
from bilevel_jax.second_derivatives import has_forward_mode, has_own_rule
from bilevel_jax.sharding import unvarying


def with_implicit_derivative(
    inner: Callable[..., object],
    solver: LinearSolver[object],
    on_failure: OnFailure,
    params: P,
    hparams: object,
    call: Call,
) -> P:
    """Return params, which JAX then differentiates as the minimizer of inner(params, hparams, *args, **named)."""
    loss, captured, jaxpr = uncover(inner, params, hparams, call)
    make_solver, options = uncover_options(solver)
    arrays, rest = split_arrays((hparams, call, captured, options))

    # A loss with captured values is made for this call, so a cache would not help.
    run = partial(_call, backend) if captured else backend.compiled
    run(_check_influence, loss, params, hparams, (call, captured))

    minimizer = Minimizer(loss, rest, make_solver, on_failure, run)
    forward = not has_own_rule(jaxpr) or _has_forward_mode(minimizer, params, arrays)
    return (with_implicit_jvp if forward else with_implicit_vjp)(minimizer, params, arrays)


def with_implicit_jvp(minimizer: Minimizer, params: P, arrays: list[jax.Array]) -> P:
    """Return params with the derivative of a minimizer in all modes.

    There is one rule, for a change of any of the arrays. For reverse mode, JAX transposes the rule, and the linear
    solve becomes the solve for the adjoint. For higher orders, JAX differentiates the rule.
    """

    @jax.custom_jvp
    def attach(params: P, arrays: list[jax.Array]) -> P:
        return params

    @partial(attach.defjvp, symbolic_zeros=True)
    def _(primals: tuple[P, list[jax.Array]], tangents: tuple[P, list[jax.Array | SymbolicZero]]) -> tuple[P, P]:
        params = attach(*primals)  # so that a derivative of this rule differentiates params too
        moves = {i: u for i, u in enumerate(tangents[1]) if not isinstance(u, SymbolicZero) and u.dtype != float0}
        if not moves:
            return params, jax.tree.map(jnp.zeros_like, params)

        system = minimizer.at(params, primals[1], list(moves))
        # JAX cannot transpose a solve if the right-hand side has a tangent in some leaves only, for example if weights
        # have a penalty and a bias has none. So `_tied` makes each leaf depend on all leaves.
        rhs = _tied(system.minus_jvp(list(moves.values())))
        change = lax.custom_linear_solve(
            lambda v: _tied(system.hvp(v)), rhs, lambda _, rhs: system.solve(rhs), symmetric=True
        )
        return params, unvarying(_tied(change), params)

    return attach(params, arrays)


def _has_forward_mode(minimizer: Minimizer, params: object, arrays: list[jax.Array]) -> bool:
    moves = [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
    inner, _, moving, args = minimizer.at(params, arrays, moves).point
    return has_forward_mode(lambda w, h: backend.inner_slope(inner, w, h, args)(w, h), params, moving)


def _tied(tree: V) -> V:
    """Return a tree in which each leaf is a linear function of all leaves: add a sum whose value is set to zero.

    The values do not change. The selection stops nan, and XLA removes it. The barrier also keeps the leaves together,
    but it is not enough: from JAX 0.11.2 on, the transpose of a barrier fails if one operand is a constant.
    """
    sums = [jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]
    zero = sum(lax.select(jnp.zeros_like(total, bool), total, jnp.zeros_like(total)) for total in sums)
    return lax.optimization_barrier(jax.tree.map(lambda leaf: leaf + jnp.asarray(zero, leaf.dtype), tree))


def _call(backend: JaxBackend, function: Callable[..., R], *args: object) -> R:
    """Call a function as `JaxBackend.compiled` does, but without a compilation."""
    return function(backend, *args)


def _check_influence(
    backend: JaxBackend, inner: Callable[..., object], params: object, hparams: object, args: Args
) -> None:
    """Raise a ValueError if ∂L/∂w does not depend on hparams. Warn about single leaves."""
    slope = backend.inner_slope(inner, params, hparams, args)
    used = dependence(trace(slope, params, hparams), params)
    if not any(used.hparams):
        raise ValueError(
            f"∂inner/∂params does not depend on {leaf_names(backend, 'hparams', hparams)}, so these have no influence "
            "on the minimum. Use the hparams argument inside inner: the training's use of it does not count."
        )
    warn_of_dependence(backend, params, hparams, None, used)
