"""The derivative of an implicit function w*(λ), as a rule for JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

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
from bilevel.trainings import Condition
from bilevel.validation import check_like, check_scalar, leaf_names
from bilevel_jax.backend import JaxBackend, backend
from bilevel_jax.closures import Call, uncover, uncover_options
from bilevel_jax.dependence import dependence, trace
from bilevel_jax.implicit_system import ImplicitFunction, WithProx, residual_of
from bilevel_jax.implicit_vjp import with_implicit_vjp
from bilevel_jax.partition import split_arrays
from bilevel_jax.second_derivatives import has_forward_mode, has_own_rule
from bilevel_jax.sharding import unvarying


def with_implicit_derivative(
    condition: Condition,
    function: Callable[..., object],
    solver: LinearSolver[object],
    on_failure: OnFailure,
    params: P,
    hparams: object,
    call: Call,
) -> P:
    """Return params, which JAX then differentiates as w* of a condition function(params, hparams, *args, **named)."""
    if condition.prox is not None:
        function = WithProx(function, condition.prox, condition.step_size)
    checked = partial(_check_value, condition, params)
    uncovered, captured, jaxpr = uncover(function, params, hparams, call, checked)
    make_solver, options = uncover_options(solver)
    arrays, rest = split_arrays((hparams, call, captured, options))

    # A function with captured values is made for this call, so a cache would not help.
    run = partial(_call, backend) if captured else backend.compiled
    run(_check_influence, condition, uncovered, params, hparams, (call, captured))

    implicit = ImplicitFunction(condition, uncovered, rest, make_solver, on_failure, run)
    forward = not has_own_rule(jaxpr) or _has_forward_mode(implicit, params, arrays)
    return (with_implicit_jvp if forward else with_implicit_vjp)(implicit, params, arrays)


def with_implicit_jvp(implicit: ImplicitFunction, params: P, arrays: list[jax.Array]) -> P:
    """Return params with the derivative of an implicit function in all modes.

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

        system = implicit.at(params, primals[1], list(moves))
        # JAX cannot transpose a solve if the right-hand side has a tangent in some leaves only, for example if weights
        # have a penalty and a bias has none. So `_tied` makes each leaf depend on all leaves.
        rhs = _tied(system.minus_jvp(list(moves.values())))
        symmetric = implicit.condition.symmetric
        change = lax.custom_linear_solve(
            lambda v: _tied(system.jvp(v)),
            rhs,
            lambda _, rhs: system.solve(rhs),
            None if symmetric else lambda _, rhs: system.solve(rhs, transposed=True),
            symmetric=symmetric,
        )
        return params, unvarying(_tied(change), params)

    return attach(params, arrays)


def _has_forward_mode(implicit: ImplicitFunction, params: object, arrays: list[jax.Array]) -> bool:
    moves = [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
    function, _, moving, args = implicit.at(params, arrays, moves).point
    return has_forward_mode(lambda w, h: function.residual(backend, w, h, args)(w, h), params, moving)


def _check_value(condition: Condition, params: object, value: Any) -> None:
    if condition.prox is not None:
        value, moved = value
        check_like(backend, "prox", moved, "params", params)
    if condition.role == "inner":
        check_scalar("inner", value)
    else:
        check_like(backend, condition.role, value, "params", params)


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
    backend: JaxBackend,
    condition: Condition,
    function: Callable[..., object],
    params: object,
    hparams: object,
    args: Args,
) -> None:
    """Raise a ValueError if r does not depend on hparams. Warn about single leaves."""
    residual = residual_of(backend, condition, function, params, hparams, args)
    used = dependence(trace(residual, params, hparams), params)
    if not any(used.hparams):
        what = "∂inner/∂params" if condition.symmetric else condition.role
        what = "The proximal step of inner and prox" if condition.prox is not None else what
        raise ValueError(
            f"{what} does not depend on {leaf_names(backend, 'hparams', hparams)}, so these have no influence on the "
            f"{condition.solution}. Use the hparams argument inside {condition.role}: the training's use of it does "
            "not count."
        )
    if not condition.symmetric:  # a step need not depend on params, and a residual may be linear in them
        used = used._replace(params=[True] * len(used.params))
    warn_of_dependence(backend, params, hparams, None, used)
