"""Derivatives by JAX transformations, compiled once per problem and solver."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from typing_extensions import override

from bilevel.problems.model_loss import ModelLoss
from bilevel.protocols import Backend, BilevelProblem, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.validation import check_dtypes, check_like, check_scalar, depends_on_nothing, leaf_names
from bilevel_jax.dependence import depends, reaches, trace
from bilevel_jax.gauss_newton import gauss_newton
from bilevel_jax.partition import join_solver, join_tree, split_solver, split_tree
from bilevel_jax.sharding import check_alike, check_collectives, devices_of
from bilevel_jax.space import JaxSpace

try:
    from jax import enable_x64
except ImportError:  # JAX before 0.8
    from jax.experimental import enable_x64  # pyright: ignore

COMPILED = 128  # programs of eager calls that are kept, some megabytes each, with what their losses close over


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
        if isinstance(leaf, Tracer) or not leaf.committed:  # goes where others are
            return None
        return devices_of(leaf.sharding)

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
    def inner(self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        slope = self.inner_slope(objective, params, hparams, args)
        # Linearized here, outside the solver's loop: its body must not trace the loss again.
        grad, hvp = jax.linearize(lambda w: slope(w, hparams), params)
        return InnerDerivatives(grad, hvp, *cross_products(slope, params, hparams))

    @override
    def gauss_newton(self, inner: ModelLoss, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        slope = self.inner_slope(inner, params, hparams, args)
        product = gauss_newton(inner, params, hparams, args)
        return InnerDerivatives(slope(params, hparams), product, *cross_products(slope, params, hparams))

    @override
    def jacobian(
        self, function: Callable[..., Any], params: Any, hparams: Any, args: tuple[Any, ...], role: str
    ) -> InnerDerivatives:
        def value_of(w: Any, h: Any) -> Any:
            value = function(w, h, *args)
            check_like(self, role, value, "params", params)
            check_dtypes(self, role, value, "params", params)
            check_alike(role, value, w, h)
            return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(value))

        self._check_influence(role, value_of, params, hparams)
        value, pull = jax.vjp(lambda w: value_of(w, hparams), params)  # outside the solver's loop, too
        return InnerDerivatives(value, lambda v: pull(v)[0], *cross_products(value_of, params, hparams))

    def inner_slope(self, inner: Any, params: Any, hparams: Any, args: tuple[Any, ...]) -> Callable[[Any, Any], Any]:
        """Return (w, λ) -> ∂L/∂w."""

        def loss(w: Any, h: Any) -> Any:
            return _scalar("inner", inner(w, h, *args), w, h)

        self._check_influence("inner", loss, params, hparams)
        return jax.grad(loss)

    def _check_influence(self, role: str, function: Callable[[Any, Any], Any], params: Any, hparams: Any) -> None:
        jaxpr = trace(lambda w: function(w, hparams), params)
        check_collectives(role, jaxpr)
        if not reaches(jaxpr):
            raise ValueError(
                f"{role} does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it."
            )

    @override
    def outer(
        self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...], role: str = "outer"
    ) -> OuterDerivatives:
        def loss(w: Any, h: Any) -> Any:
            return _scalar(role, objective(w, h, *args), w, h)

        jaxpr = trace(lambda h: loss(params, h), hparams)
        check_collectives(role, jaxpr)
        if not reaches(jaxpr):
            if not depends(lambda w: loss(w, hparams), params):
                raise ValueError(f"{depends_on_nothing(self, role, params, hparams)}: use the arguments inside it.")
            return OuterDerivatives(*jax.value_and_grad(loss)(params, hparams), None)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hparams)
        return OuterDerivatives(value, *grads)

    @override
    def execute(
        self, function: Callable[..., Any], solver: Solver | None, problem: BilevelProblem, point: Point
    ) -> Any:
        check_stateless(solver)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(point)):
            return function(self, solver, problem, point)
        return self.compiled(function, solver, problem, point)

    def compiled(self, function: Callable[..., Any], solver: Any, problem: Any, point: Any) -> Any:
        """Do the same through a ``jit`` that is cached by everything but the arrays, where that can be compared.

        ``problem`` is anything that the function takes, ``point`` any tree; nothing else may hold a tracer.
        """
        arrays: list[Any] = []
        try:
            call = _compiled(function, self, problem, split_tree(point, arrays), split_solver(solver, arrays))
        except TypeError:  # nothing that could be compared by its value
            return function(self, solver, problem, point)
        return call(arrays)

    @override
    @contextmanager
    def aside(self, point: Point, double: bool) -> Iterator[Callable[[Any, Any], Point]]:
        def convert(leaf: Any) -> Any:
            convertible = double and isinstance(leaf, jax.Array | np.ndarray) and self.is_floating(leaf)
            return jnp.asarray(leaf, jnp.float64) if convertible else leaf

        with enable_x64(True) if double else nullcontext():
            yield lambda params, hparams: jax.tree.map(convert, point._replace(params=params, hparams=hparams))


def check_stateless(solver: Any) -> None:
    """Raise a TypeError if a solver is one that remembers: compiled code would not."""
    if hasattr(solver, "load_state_dict"):
        raise TypeError(
            f"{type(solver).__name__} keeps a state from call to call, which code that JAX compiles cannot. Carry the "
            "state yourself: pass adjoint0=hg.adjoint of the last call (return it with what your step returns), and "
            "the solver of bl.prepare for a step size, sketch or preconditioner found once."
        )


@lru_cache(maxsize=COMPILED)
def _compiled(function: Callable[..., Any], backend: JaxBackend, problem: Any, point: Any, solver: Any) -> Any:
    """Return a ``jit`` of the arrays. What is static is none of its arguments: JAX would hold on to 4096 of them."""

    @jax.jit
    def call(arrays: list[Any]) -> Any:
        supply = iter(arrays)
        placed = join_tree(point, supply)
        return function(backend, join_solver(solver, supply), problem, placed)

    return call


def cross_products(
    function: Callable[[Any, Any], Any], params: Any, hparams: Any
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return v -> (∂function/∂λ)ᵀ v, None where it does not depend on λ, and u -> (∂function/∂λ) u."""

    def of_hparams(h: Any) -> Any:
        return function(params, h)

    influences = depends(of_hparams, hparams)

    def cross_vjp(v: Any) -> Any:
        # In λ alone: one joint pull over (w, λ) costs several gradients.
        return jax.vjp(of_hparams, hparams)[1](v)[0] if influences else None

    def cross_jvp(u: Any) -> Any:
        return jax.jvp(of_hparams, (hparams,), (u,))[1]  # in a loop, XLA hoists what does not depend on u

    return cross_vjp, cross_jvp


def _scalar(role: str, value: Any, params: Any, hparams: Any) -> Any:
    check_scalar(role, value)
    check_alike(role, value, params, hparams)
    return value


backend = JaxBackend()
