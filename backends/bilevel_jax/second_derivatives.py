"""Hessian-vector products, by forward mode where a loss has one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend.core import Jaxpr

from bilevel.spaces.array import P, V
from bilevel_jax.sharding import equations


def linearize(slope: Callable[[P], P], params: P) -> tuple[P, Callable[[P], P]]:
    """Return ∂L/∂w and v -> (∂²L/∂w²) v, for use inside loops.

    Products are forward over reverse, the fastest way in JAX. A function with a `jax.custom_vjp` inside its rule, such
    as an ODE solver, has no forward mode. Then they are reverse over reverse.

    Raises:
        TypeError: if JAX has no second derivative in either way.
    """
    try:
        grad, product = jax.linearize(slope, params)
        _check_trace(product, params)
        return grad, product
    except Exception:  # JAX and its packages raise errors of many types
        jax.eval_shape(slope, params)  # raises the errors of the loss itself
    with explained():
        grad, pull = jax.vjp(slope, params)
        _check_trace(pull, grad)
    return grad, lambda v: pull(v)[0]


def has_forward_mode(slope: Callable[..., object], *points: object) -> bool:
    """Return whether JAX has a forward mode of the first derivative of a loss."""
    try:
        _check_trace(lambda *points: jax.jvp(slope, points, points), *points)
    except Exception:
        return False
    return True


def _check_trace(function: Callable[..., object], *points: object) -> None:
    """Raise the error of a derivative that does not exist. For a `jax.custom_vjp`, JAX raises it only when it runs."""
    jaxpr = jax.make_jaxpr(function)(*points).jaxpr
    if any(equation.primitive.name == "custom_lin" for equation in equations(jaxpr)):
        raise TypeError("a function with a jax.custom_vjp has no forward mode.")


def has_own_rule(jaxpr: Jaxpr) -> bool:
    """Return whether a function calls a `jax.custom_vjp`. Only then its derivative may have no forward mode."""
    return any(equation.primitive.name.startswith("custom_vjp_call") for equation in equations(jaxpr))


def linearize_model(model: Callable[[P], V], params: P) -> tuple[V, Callable[[P], V]]:
    """Return z = model(w) and u -> (∂z/∂w) u.

    Raises:
        TypeError: if the model has no forward mode.
    """
    with explained("forward mode of model"):
        output, product = jax.linearize(model, params)
        _check_trace(product, params)
    return output, product


@contextmanager
def explained(missing: str = "second derivative of inner") -> Iterator[None]:
    """Raise a TypeError with advice in place of JAX's error for a derivative that it does not have."""
    try:
        yield
    except Exception as error:
        said: Any = str(error).strip().partition("\n")[0]
        raise TypeError(
            f"JAX has no {missing}. Most often, a function in it has a jax.custom_vjp, such as an ODE "
            'solver or a solver with implicit derivatives. Use bl.hypergradient with bl.Problem(..., curvature="finite-'
            'differences"), which needs only gradients, or write the optimality condition as the residual of bl.Root. '
            "Or choose an algorithm of the package with all derivatives, such as adjoint=diffrax.DirectAdjoint(). "
            f"JAX raised: {said}"
        ) from error
