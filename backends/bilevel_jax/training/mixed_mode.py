"""Gradients whose own derivatives are forward over reverse.

Kemaev, Calian, Zintgraf, Farquhar & van Hasselt, Scalable Meta-Learning via Mixed-Mode Differentiation, ICML 2025.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from bilevel.validation import check_scalar
from bilevel_jax.dependence import dependence
from bilevel_jax.partition import split_arrays
from bilevel_jax.second_derivatives import has_own_rule

Arrays = list[Any]


def mixed_mode_grad(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradient of a loss by its first argument, like `jax.grad`, for use inside a derivative.

    Reverse mode through `jax.grad` stores the whole graph of the gradient. Here it stores the arguments only. The
    cotangent u of the gradient is pulled back by forward over reverse:

        (∂g/∂x)ᵀ u = d/dε ∂L/∂x (w + ε u, ...)      with   g = ∂L/∂w   and   x = w or another argument

    So the peak memory is about twice as much as the memory of one gradient. The Hessian must be symmetric. The rule of
    a `jax.custom_vjp` may be no derivative, such as a gradient that is clipped. So a loss that calls one is
    differentiated by reverse over reverse. The rule of a `jax.custom_jvp` must be a derivative.

    Args:
        loss: a function of (params, *args). It returns a scalar.

    Returns:
        A function of the same arguments that returns a tree like params. JAX differentiates it in reverse mode, and
        raises its own error for forward mode.

    Raises:
        TypeError: if loss is no function.

    >>> loss = lambda w, x: jnp.sum(x * w**3)
    >>> pulled = jax.grad(lambda x: jnp.sum(mixed_mode_grad(loss)(jnp.array([1.0, 2.0]), x)))
    >>> pulled(jnp.ones(2)).tolist()
    [3.0, 12.0]
    """

    if not callable(loss):
        raise TypeError(f"loss: expected a function of (params, *args), got {type(loss).__name__}.")

    def gradient(params: Any, *args: Any) -> Any:
        return value_and_grad(lambda *args: (loss(*args), None), params, *args)[1]

    return gradient


def value_and_grad(loss: Callable[..., tuple[Any, Any]], params: Any, *args: Any) -> tuple[tuple[Any, Any], Any]:
    """Return ((value, aux), gradient) of a loss that returns (value, aux), with the rule of `mixed_mode_grad`."""
    params = jax.tree.map(jnp.asarray, params)
    arrays, rest = split_arrays((params, args))
    structure = jax.tree.structure(params)

    def of_arrays(arrays: Arrays) -> tuple[Any, Any]:
        params, args = rest.join(arrays)
        value, aux = loss(params, *args)
        check_scalar("loss", value)
        return value, aux

    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    count = structure.num_leaves
    used = dependence(closed.jaxpr, arrays[:count])
    if has_own_rule(closed.jaxpr) or not any(used.params):
        return jax.value_and_grad(loss, has_aux=True)(params, *args)
    # With the rule, the result depends on all arguments. So an array without influence must not be one of them.
    others = [
        x if flag or not _smooth(x) else lax.stop_gradient(x)
        for x, flag in zip(arrays[count:], used.hparams, strict=True)
    ]
    # The rule must not close over values that JAX differentiates, so they become arguments.
    captured: Arrays = [const for const in closed.consts if isinstance(const, Tracer)]
    constants = [None if isinstance(const, Tracer) else const for const in closed.consts]

    def of_trace(weights: Arrays, others: Arrays) -> tuple[Any, Any]:
        supply = iter(others)
        consts = [next(supply) if const is None else const for const in constants]
        outputs = jax.core.eval_jaxpr(closed.jaxpr, consts, *weights, *supply)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    result, gradient = _with_rule(of_trace)(arrays[:count], [*captured, *others])
    return result, jax.tree.unflatten(structure, gradient)


def _with_rule(loss: Callable[[Arrays, Arrays], tuple[Any, Any]]) -> Callable[[Arrays, Arrays], tuple[Any, Arrays]]:
    """Return the function (weights, others) -> ((value, aux), gradient). It stores its arguments only."""

    @jax.custom_vjp
    def function(weights: Arrays, others: Arrays) -> tuple[Any, Arrays]:
        return jax.value_and_grad(loss, has_aux=True)(weights, others)

    def forward(weights: Any, others: Any) -> tuple[Any, tuple[Arrays, Arrays]]:
        point = [x.value for x in weights], [x.value for x in others]
        return function(*point), point

    def backward(point: tuple[Arrays, Arrays], cotangents: Any) -> tuple[Arrays, Arrays]:
        weights, others = point
        of_result, of_gradient = cotangents
        moves = [_smooth(x) for x in others]
        moving = [x for x in others if _smooth(x)]

        def of_moving(weights: Arrays, moving: Arrays) -> tuple[Any, Any]:
            supply = iter(moving)
            return loss(weights, [next(supply) if move else x for x, move in zip(others, moves, strict=True)])

        def slopes(weights: Arrays) -> tuple[Arrays, Arrays]:
            return jax.grad(of_moving, (0, 1), has_aux=True)(weights, moving)[0]

        parts: list[tuple[Arrays, Arrays]] = []
        if _used(of_result):
            result, pull = jax.vjp(of_moving, weights, moving)
            parts.append(pull(_dense(of_result, result)))
        if _used(of_gradient):
            # Only the weights move, so JAX skips the tangents of all else.
            parts.append(jax.jvp(slopes, (weights,), (_dense(of_gradient, weights),))[1])
        if not parts:
            return [None] * len(weights), [None] * len(others)
        total, of_others = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *parts)
        supply = iter(of_others)
        return total, [next(supply) if move else None for move in moves]

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _smooth(x: Any) -> bool:
    """Return whether an array may have a derivative. Integers and keys of random numbers have none."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _used(cotangents: Any) -> bool:
    """Return whether a later computation uses a result, so that it has a cotangent."""
    leaves = jax.tree.leaves(cotangents)
    return any(not isinstance(leaf, SymbolicZero) and leaf.dtype != jax.dtypes.float0 for leaf in leaves)


def _dense(cotangents: Any, primals: Any) -> Any:
    """Return cotangents with arrays in place of symbolic zeros."""

    def dense(cotangent: Any, primal: Any) -> Any:
        if not _smooth(primal):
            return np.zeros(primal.shape, jax.dtypes.float0)
        return jnp.zeros_like(primal) if isinstance(cotangent, SymbolicZero) else cotangent

    return jax.tree.map(dense, cotangents, primals)
