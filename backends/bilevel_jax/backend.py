"""Derivatives by JAX transformations, compiled once per problem and solver."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from typing_extensions import override

from bilevel.backend import Backend, Data, R
from bilevel.batch_sums import differentiated, linearized, over_micro_batches
from bilevel.linearization import Dependence, Inputs, JointProduct, LinearizedMap, OuterDerivatives
from bilevel.micro_batches import MicroBatches
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, H, Number, P, V
from bilevel.spaces.space import State
from bilevel.validation import check_dtypes, check_like, check_scalar, check_values, depends_on_nothing, leaf_names
from bilevel_jax.dependence import dependence, trace
from bilevel_jax.gauss_newton import gauss_newton
from bilevel_jax.micro_batches import fold
from bilevel_jax.partition import Divided, combine, partition
from bilevel_jax.second_derivatives import linearize
from bilevel_jax.sharding import check_alike, check_collectives, devices_of, varying
from bilevel_jax.space import JaxSpace
from bilevel_jax.steps import JaxSteps

try:
    from jax import enable_x64
except ImportError:  # JAX before 0.8
    from jax.experimental import enable_x64  # pyright: ignore

COMPILED = 128  # cached programs of eager calls: some megabytes each, plus the arrays that their losses close over


class JaxBackend(Backend):
    """JAX arrays, with and without ``jit`` and ``vmap``.

    Products are linearized once. They are forward over reverse if the loss has a forward mode. An eager call is
    compiled by ``jit`` and cached by problem and solver. Pass the same functions each time, not new lambdas.
    """

    name = "jax"
    compiles = True

    @override
    def owns(self, leaf: object) -> bool:
        return isinstance(leaf, jax.Array)

    @override
    def space(self, tree: V) -> JaxSpace[V]:
        return JaxSpace(tree)

    @override
    def leaves(self, tree: object) -> list[tuple[str, Any]]:
        if isinstance(tree, Iterator):  # such as module.parameters(): no tree, and JAX warns about it
            return [("", tree)]
        return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]

    @override
    def steps(self, step: Callable[..., Any]) -> JaxSteps:
        return JaxSteps(self, step)

    @override
    def map(self, function: Callable[[Any], Any], tree: V) -> V:
        return jax.tree.map(function, tree)

    @override
    def to_bytes(self, array: jax.Array) -> np.ndarray:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(array))
        return np.frombuffer(np.asarray(array).tobytes(), np.uint8)

    @override
    def from_bytes(self, array: np.ndarray, like: jax.Array) -> jax.Array:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
        found = np.frombuffer(array.tobytes(), like.dtype).reshape(like.shape)
        return jax.device_put(found, like.sharding) if like.committed else jnp.asarray(found)

    @override
    def is_floating(self, leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    @override
    def device(self, leaf: jax.Array) -> str | None:
        if isinstance(leaf, Tracer) or not leaf.committed:  # JAX moves it to the other operands
            return None
        return devices_of(leaf.sharding)

    @override
    def devices(self) -> list[str]:
        return [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]

    @override
    def to_host(self, scalar: jax.Array) -> Any:
        return None if isinstance(scalar, Tracer) else scalar.item()

    @override
    def from_numpy(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array)

    @override
    def to_numpy(self, array: jax.Array) -> np.ndarray:
        return np.asarray(array)

    @override
    @over_micro_batches(linearized)
    def inner(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        slope = self.inner_slope(objective, params, hparams, args)
        # Linearized outside the solver's loop, because its body must not trace the loss again.
        grad, hvp = linearize(lambda w: slope(w, hparams), params)
        return _linearized(slope, params, hparams, grad, hvp)

    @override
    @over_micro_batches(linearized)
    def gauss_newton(self, inner: ModelLoss, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        slope = self.inner_slope(inner, params, hparams, args)
        product = gauss_newton(inner, params, hparams, args)
        return _linearized(slope, params, hparams, slope(params, hparams), product)

    @override
    @over_micro_batches(linearized)
    def jacobian(
        self, function: Callable[..., object], params: P, hparams: H, args: Args, label: str
    ) -> LinearizedMap[P, H]:
        value_of = self.checked_map(function, params, hparams, args, label)
        value, pull = jax.vjp(lambda w: value_of(w, hparams), params)  # also outside the solver's loop
        at = _linearized(value_of, params, hparams, value, lambda v: pull(v)[0])
        return at._replace(jvp_params=transpose(at.vjp_params, params))

    def checked_map(
        self, function: Callable[..., object], params: P, hparams: H, args: Args, label: str
    ) -> Callable[[P, H], P]:
        """Return (w, λ) -> function(w, λ, *args), which must be a tree like params."""

        def value_of(w: P, h: H) -> P:
            value = function(w, h, *args)
            check_like(self, label, value, "params", params)
            check_dtypes(self, label, value, "params", params)
            check_alike(label, value, w, h)
            return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(value))

        self._check_influence(label, value_of, params, hparams)
        return value_of

    def inner_slope(self, inner: Callable[..., object], params: P, hparams: H, args: Args) -> Callable[[P, H], P]:
        """Return (w, λ) -> ∂L/∂w."""

        def loss(w: P, h: H) -> Any:
            return _scalar("inner", inner(w, h, *args), w, h)

        self._check_influence("inner", loss, params, hparams)
        return jax.grad(loss)

    def _check_influence(self, label: str, function: Callable[[P, H], object], params: P, hparams: H) -> None:
        jaxpr = trace(function, params, hparams)
        check_collectives(label, jaxpr)
        if not any(dependence(jaxpr, params).params):
            raise ValueError(
                f"{label} does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it."
            )

    @override
    @over_micro_batches(differentiated)
    def outer(
        self,
        objective: Callable[..., object],
        params: P,
        hparams: H,
        args: Args,
        *,
        label: str = "outer",
        data: Data = "outer",
    ) -> OuterDerivatives[P, H]:
        def loss(w: P, h: H) -> Any:
            return _scalar(label, objective(w, h, *args), w, h)

        used = self._used(label, loss, params, hparams)
        if any(used.hparams):
            value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hparams)
            return OuterDerivatives(value, grads[0], grads[1], used)
        value, grad = jax.value_and_grad(loss)(params, hparams)
        return OuterDerivatives(value, grad, None, used)

    def _used(self, label: str, function: Callable[[P, H], object], params: P, hparams: H) -> Dependence:
        """Return on which leaves an objective depends. Raise a ValueError if there are none."""
        jaxpr = trace(function, params, hparams)
        check_collectives(label, jaxpr)
        used = dependence(jaxpr, params)
        if not any(used.params) and not any(used.hparams):
            raise ValueError(f"{depends_on_nothing(self, label, params, hparams)}. Use the arguments inside it.")
        return used

    @override
    def outers(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        def losses(w: P, h: H) -> Any:
            values = objective(w, h, *args)
            check_values(values)
            check_alike("outer", values, w, h)
            return values

        used = self._used("outer", losses, params, hparams)
        moving, fixed = ((params, hparams), ()) if any(used.hparams) else ((params,), (hparams,))
        values, pull = jax.vjp(lambda *moving: losses(*moving, *fixed), *moving)
        grads = jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))
        return OuterDerivatives(values, grads[0], grads[1] if any(used.hparams) else None, used)

    @override
    def batched(self, function: Callable[..., R], *stacks: Any) -> R:
        return jax.vmap(function)(*stacks)

    @override
    def fold(
        self, batches: MicroBatches, body: Callable[[State, Args, Number], State], state: State
    ) -> tuple[State, Number]:
        return fold(batches, body, state)

    @override
    def run(self, function: Callable[..., R], *args: Any, **options: Any) -> R:
        """See `bilevel.backend.Backend.run`. Inside the caller's trace, nothing is compiled."""
        return self._run(function, args, options, inside_traces=False)

    def compiled(self, function: Callable[..., R], *args: object) -> R:
        """Call a function as `run` does, but compile it inside the caller's trace too: arguments may hold tracers."""
        return self._run(function, args, {}, inside_traces=True)

    def _run(self, function: Callable[..., R], args: Args, options: dict[str, object], inside_traces: bool) -> R:
        arrays: list[object] = []
        try:
            static = partition((args, options), arrays)
            hash(static)
        except TypeError:  # a leaf cannot be compared by its value
            return function(self, *args, **options)
        if not inside_traces and any(isinstance(array, Tracer) for array in arrays):
            return function(self, *args, **options)
        return _compiled(function, self, static)(arrays)

    @override
    @contextmanager
    def isolated(self, inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
        def convert(leaf: object) -> object:
            floating = isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)
            return jnp.asarray(leaf, jnp.float64) if double and floating else leaf

        with enable_x64(True) if double else nullcontext():
            yield lambda params, hparams: jax.tree.map(convert, inputs._replace(params=params, hparams=hparams))


@lru_cache(maxsize=COMPILED)
def _compiled(function: Callable[..., R], backend: JaxBackend, static: Divided) -> Callable[[list[object]], R]:
    """Return a ``jit`` of the arrays. The static part is no argument of it: JAX would keep 4096 static arguments."""

    @jax.jit
    def call(arrays: list[object]) -> R:
        args, options = combine(static, iter(arrays))
        return function(backend, *args, **options)

    return call


def _linearized(
    function: Callable[[P, H], P], params: P, hparams: H, residual: P, vjp_params: Callable[[P], P]
) -> LinearizedMap[P, H]:
    """Return a map with the products by λ. Each is traced only where it is called."""

    @cache
    def used() -> Dependence:
        return dependence(trace(function, params, hparams), params)

    def cross(v: P, h: H) -> H | None:
        return vjp_in_hparams(function, params, h, v) if any(used().hparams) else None

    def vjp_hparams(v: P) -> H | None:
        # XLA would share what depends on λ alone with the products, and keep it in memory during the solve.
        return cross(v, _late(hparams, v))

    def vjp(v: P) -> tuple[P, H | None]:
        return vjp_params(v), cross(v, hparams)

    def jvp_hparams(u: H) -> P:
        return jvp_in_hparams(function, params, hparams, u)

    joint = JointProduct((vjp_params, vjp_hparams), vjp)
    return LinearizedMap(residual, vjp_params, vjp_hparams, jvp_hparams, used, joint=joint)


@jax.custom_jvp
def _late(tree: V, after: object) -> V:
    """Return a tree unchanged. XLA computes what is computed from the result after ``after``, and shares none of it."""
    if any(map(varying, jax.tree.leaves((tree, after)))):
        return tree  # in a shard_map: after a barrier, all leaves would vary along the axes of any leaf
    return jax.lax.optimization_barrier((tree, after))[0]


@_late.defjvp
def _(primals: tuple[V, object], tangents: tuple[V, object]) -> tuple[V, V]:
    return _late(*primals), tangents[0]  # a barrier has no transpose if one of its operands is a constant


def transpose(product: Callable[[P], P], like: P) -> Callable[[P], P]:
    """Return the transpose of a linear map between trees like ``like``."""
    return lambda v: jax.linear_transpose(product, like)(v)[0]


def vjp_in_hparams(function: Callable[[P, H], P], params: P, hparams: H, v: P) -> H:
    """Return (∂function/∂λ)ᵀ v."""
    # In λ only: a joint pull over (w, λ) costs several gradients.
    return jax.vjp(lambda h: function(params, h), hparams)[1](v)[0]


def jvp_in_hparams(function: Callable[[P, H], P], params: P, hparams: H, u: H) -> P:
    """Return (∂function/∂λ) u."""
    return jax.jvp(lambda h: function(params, h), (hparams,), (u,))[1]  # in a loop, XLA hoists the part without u


def _scalar(label: str, value: object, params: object, hparams: object) -> Any:
    check_scalar(label, value)
    check_alike(label, value, params, hparams)
    return value


backend = JaxBackend()
