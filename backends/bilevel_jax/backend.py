"""Derivatives by JAX transformations, compiled once per problem and solver."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from typing_extensions import override

from bilevel.problem import Problem
from bilevel.protocols import Backend, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.validation import check_scalar, leaf_names
from bilevel_jax.dependence import depends
from bilevel_jax.space import JaxSpace


class JaxBackend(Backend):
    """JAX arrays, under ``jit`` and ``vmap`` or not.

    Products are forward over reverse, linearized once: the fastest in JAX. An eager call runs through a ``jit`` of
    its own, cached by problem and solver: give it the same functions each time, not new lambdas.
    """

    name = "jax"
    space = JaxSpace()

    @override
    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array)

    @override
    def leaves(self, tree: Any) -> list[tuple[str, Any]]:
        if isinstance(tree, Iterator):  # module.parameters(), say: no tree, and JAX warns of it
            return [("", tree)]
        return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]

    @override
    def is_floating(self, leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    @override
    def device(self, leaf: Any) -> str | None:
        return None  # JAX itself refuses arrays on different devices, and knows of shardings

    @override
    def devices(self) -> list[str]:
        return [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]

    @override
    def to_host(self, scalar: Any) -> Any:
        return None if isinstance(scalar, Tracer) else scalar.item()

    @override
    def from_numpy(self, array: Any) -> Any:
        return jnp.asarray(array)

    @override
    def to_numpy(self, array: Any) -> Any:
        return np.asarray(array)

    @override
    def inner(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        def loss(w: Any, h: Any) -> Any:
            return _scalar("inner", problem.inner(w, h, *args))

        # Linearized here, outside the solver's loop: its body must not trace the loss again.
        grad, hvp = jax.linearize(lambda w: jax.grad(loss)(w, hparams), params)

        def grad_of(h: Any) -> Any:
            return jax.grad(loss)(params, h)

        def cross_vjp(v: Any) -> Any:
            # In λ alone: one joint pull over (w, λ) costs several gradients.
            return jax.vjp(grad_of, hparams)[1](v)[0] if influences else None

        influences = depends(grad_of, hparams)
        if not depends(lambda w: loss(w, hparams), params):
            raise ValueError(
                f"inner does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it."
            )
        return InnerDerivatives(grad, hvp, cross_vjp)

    @override
    def outer(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> OuterDerivatives:
        def loss(w: Any, h: Any) -> Any:
            return _scalar("outer", problem.outer(w, h, *args))

        if not depends(lambda h: loss(params, h), hparams):
            if not depends(lambda w: loss(w, hparams), params):
                names = f"{leaf_names(self, 'params', params)} nor {leaf_names(self, 'hparams', hparams)}"
                raise ValueError(f"outer depends on neither {names}: use the arguments inside it.")
            return OuterDerivatives(*jax.value_and_grad(loss)(params, hparams), None)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hparams)
        return OuterDerivatives(value, *grads)

    @override
    def execute(self, function: Callable[..., Any], solver: Solver | None, problem: Problem, point: Point) -> Any:
        leaves, structure = jax.tree.flatten(point)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(self, solver, problem, point)
        arrays = [leaf if _is_number(leaf) else None for leaf in leaves]
        constants = tuple(None if _is_number(leaf) else (type(leaf), leaf) for leaf in leaves)
        options, other_options = _split_options(solver)
        static = (function, self, type(solver), other_options, problem, structure, constants)
        if not all(c is None or isinstance(c[1], _CONSTANTS) for c in (*constants, *other_options)):
            return function(self, solver, problem, point)  # nothing that jit could compare by its value
        try:
            hash(static)
        except TypeError:
            return function(self, solver, problem, point)
        return _compiled(static, options, arrays)


_CONSTANTS = (bool, int, float, str, bytes, type(None), Enum, FunctionType, type)


@partial(jax.jit, static_argnums=0)
def _compiled(static: Any, options: dict[str, Any], arrays: list[Any]) -> Any:
    function, backend, make, other_options, problem, structure, constants = static
    solver = None if make is type(None) else make(**{name: value for _, value, name in other_options}, **options)
    leaves = [array if constant is None else constant[1] for array, constant in zip(arrays, constants, strict=True)]
    return function(backend, solver, problem, jax.tree.unflatten(structure, leaves))


def _is_number(leaf: Any) -> bool:
    """Tell what jit takes as an argument; integers, flags and strings stay what Python made them."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biufcV"  # V: bfloat16 and its like
    return isinstance(leaf, jax.Array | np.floating | float)


def _split_options(solver: Any) -> tuple[dict[str, Any], tuple[tuple[type, Any, str], ...]]:
    """Split a solver into the options that may change without compiling anew, and (type, value, name) of the others.

    Only what a frozen dataclass is made of is safe to rebuild and to compare; anything else is one incomparable value.
    """
    if solver is None:
        return {}, ()
    if not (is_dataclass(solver) and solver.__dataclass_params__.frozen):  # pyright: ignore[reportAttributeAccessIssue]
        return {}, ((object, solver, ""),)
    known = fields(solver)
    if len(known) != len(solver.__dataclass_fields__) or not all(field.init for field in known):  # an InitVar, say
        return {}, ((object, solver, ""),)
    options = {field.name: getattr(solver, field.name) for field in known}
    # A zero stays constant: it often switches something off.
    numbers = {k: v for k, v in options.items() if _is_number(v) and not (isinstance(v, float) and v == 0)}
    return numbers, tuple((type(v), v, k) for k, v in options.items() if k not in numbers)


def _scalar(role: str, value: Any) -> Any:
    check_scalar(role, value)
    return value
