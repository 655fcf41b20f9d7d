"""The derivative of an implicit function in reverse mode only, for functions without a forward mode."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import Partial

from bilevel.spaces.array import P
from bilevel_jax.implicit_system import ImplicitFunction
from bilevel_jax.sharding import unvarying

Cotangents = tuple[None, list[jax.Array | None]]


def with_implicit_vjp(implicit: ImplicitFunction, params: P, arrays: list[jax.Array]) -> P:
    """Return params with the derivative of an implicit function in reverse mode, of first order."""

    @jax.custom_vjp
    def attach(params: P, arrays: list[jax.Array]) -> P:
        return params

    def forward(params: object, arrays: list[jax.custom_derivatives.CustomVJPPrimal]) -> tuple[object, Partial]:
        params = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=_is_primal)
        moves = [i for i, array in enumerate(arrays) if array.perturbed]
        return params, Partial(partial(_pull, implicit, tuple(moves)), params, [array.value for array in arrays])

    def backward(pull: Callable[[object], Cotangents], cotangent: object) -> Cotangents:
        return pull(jax.tree.map(_array, cotangent, is_leaf=_is_zero))

    attach.defvjp(forward, backward, symbolic_zeros=True)
    return attach(params, arrays)


def _pull(
    implicit: ImplicitFunction, moves: tuple[int, ...], params: P, arrays: list[jax.Array], cotangent: P
) -> Cotangents:
    system = implicit.at(params, arrays, moves)
    found = unvarying(system.minus_vjp(system.solve(cotangent, transposed=True)), [arrays[i] for i in moves])
    cotangents = dict(zip(moves, found, strict=True))
    return None, [cotangents.get(i) for i in range(len(arrays))]


def _is_primal(leaf: object) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _is_zero(leaf: object) -> bool:
    return isinstance(leaf, SymbolicZero)


def _array(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf
