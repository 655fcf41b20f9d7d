"""Derivatives by JAX transformations, compiled once per problem and solver."""

from collections.abc import Callable, Iterator
from functools import partial
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
from bilevel_jax.static import join_solver, join_tree, split_solver, split_tree


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

        def cross_jvp(u: Any) -> Any:
            return jax.jvp(grad_of, (hparams,), (u,))[1]  # in a loop, XLA hoists what does not depend on u

        influences = depends(grad_of, hparams)
        if not depends(lambda w: loss(w, hparams), params):
            raise ValueError(
                f"inner does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it."
            )
        return InnerDerivatives(grad, hvp, cross_vjp, cross_jvp)

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
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(point)):
            return function(self, solver, problem, point)
        arrays: list[Any] = []
        try:
            static = (function, self, problem, split_tree(point, arrays), split_solver(solver, arrays))
            hash(static)
        except TypeError:  # nothing that jit could compare by its value
            return function(self, solver, problem, point)
        return _compiled(static, arrays)


@partial(jax.jit, static_argnums=0)
def _compiled(static: Any, arrays: list[Any]) -> Any:
    function, backend, problem, point, solver = static
    supply = iter(arrays)
    point = join_tree(point, supply)
    return function(backend, join_solver(solver, supply), problem, point)


def _scalar(role: str, value: Any) -> Any:
    check_scalar(role, value)
    return value
