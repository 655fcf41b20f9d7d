"""Gauss-Newton products, linearized once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, P
from bilevel.validation import check_scalar
from bilevel_jax.dependence import dependence, trace
from bilevel_jax.second_derivatives import linearize, linearize_model


def gauss_newton(inner: ModelLoss, params: P, hparams: object, args: Args) -> Callable[[P], P]:
    """Return v -> Jᵀ (∂²loss/∂output²) J v + ∂²penalty/∂w² v with J = ∂output/∂w, for use inside loops.

    Raises:
        ValueError: if the output of the model does not depend on params.
        TypeError: if JAX lacks a derivative.
    """
    x, targets = inner.split(*args)
    output, structure = jax.tree.flatten(inner.model(params, hparams, x))
    varying = [i for i, z in enumerate(output) if jnp.issubdtype(z.dtype, jnp.floating)]

    def model(w: P) -> list[jax.Array]:
        leaves = jax.tree.leaves(inner.model(w, hparams, x))
        return [leaves[i] for i in varying]

    if not any(dependence(trace(model, params), params).params):
        raise ValueError(
            "the output of model does not depend on params. Use that argument inside it, without jax.lax.stop_gradient."
        )

    def loss(zs: list[jax.Array]) -> jax.Array:
        whole = dict(enumerate(output)) | dict(zip(varying, zs, strict=True))
        value = inner.loss(jax.tree.unflatten(structure, whole.values()), *targets)
        check_scalar("loss", value)
        return value

    zs, push = linearize_model(model, params)
    pull = jax.linear_transpose(push, params)
    bend = linearize(jax.grad(loss), zs)[1]
    if inner.penalty is None:
        return lambda v: pull(bend(push(v)))[0]
    penalty = inner.penalty
    penalize = linearize(jax.grad(lambda w: penalty(w, hparams)), params)[1]
    return lambda v: jax.tree.map(jnp.add, pull(bend(push(v)))[0], penalize(v))
