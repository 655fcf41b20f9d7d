"""Elementwise primitives whose partial derivatives are zero where they would be infinite or nan."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

# Linear primitives are absent: their derivatives are finite. So are piecewise constant ones.
_ALGEBRA = ("sqrt", "rsqrt", "cbrt", "div", "pow", "integer_pow", "square", "mul", "max", "min", "rem", "abs")
_SPECIAL = ("log", "log1p", "exp", "exp2", "expm1", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma")
_ANGLES = ("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh")
ELEMENTWISE = frozenset((*_ALGEBRA, *_SPECIAL, *_ANGLES))

_INNER = 0.5  # all primitives but acosh have finite derivatives of all orders where all arguments are 0.5


@lru_cache(maxsize=1024)
def finite_partials(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Any:
    """Return an elementwise primitive as a function with finite partial derivatives, in both modes and at all orders.

    A derivative of infinity times zero is nan. This occurs at the root of a second moment that is zero, and behind a
    ``where`` that selects another branch. The product is zero there if the function has a derivative.
    """
    options = dict(params)

    @jax.custom_jvp
    def function(*args: jax.Array) -> jax.Array:
        return primitive.bind(*args, **options)

    @function.defjvp
    def _(args: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        value = function(*args)  # not the primitive: a second derivative differentiates this line too
        args = tuple(jnp.broadcast_to(x, value.shape) for x in args)
        total = jnp.zeros_like(value)
        for i, (x, tangent) in enumerate(zip(args, tangents, strict=True)):
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                continue

            def of_one(x: jax.Array, args: tuple[jax.Array, ...], i: int = i) -> jax.Array:
                return primitive.bind(*args[:i], x, *args[i + 1 :], **options)

            partial = _slope(of_one, args, i)
            finite = jnp.isfinite(partial)
            # The partial at another point, where it is finite: else its own derivative would be nan.
            inner = tuple(
                jnp.where(finite, y, jnp.asarray(_INNER, y.dtype)) if jnp.issubdtype(y.dtype, jnp.inexact) else y
                for y in args
            )
            total = total + jnp.where(finite, _slope(of_one, inner, i) * tangent, 0)
        return value, total

    return function


def _slope(of_one: Any, args: tuple[jax.Array, ...], i: int) -> jax.Array:
    return jax.jvp(lambda x: of_one(x, args), (args[i],), (jnp.ones_like(args[i]),))[1]
