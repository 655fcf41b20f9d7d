"""Optimizers with the derivatives of their values."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from bilevel_jax.partition import split_arrays
from bilevel_jax.training.rewrite import evaluate

T = TypeVar("T")


def differentiable(optimizer: T) -> T:
    """Return an optimizer with the same values, whose derivatives are right.

    The values are equal to the last bit in compiled code, and to rounding elsewhere.

    The update is traced, and evaluated with other derivatives:

    - An elementwise partial derivative that is infinite or nan counts as zero. Without this, one weight without a
      gradient makes all derivatives through `optax.adam` nan, because the root of its second moment is zero. The
      derivative of `optax.radam` is always nan, because a ``where`` hides the root of a negative number.
    - `jax.lax.stop_gradient` is the identity. Without this, derivatives through `optax.lbfgs` are wrong.

    They hold in forward and reverse mode, under `jax.jit` and `jax.vmap`, and at second order. Functions with their own
    rule (`jax.custom_jvp`, `jax.custom_vjp`) keep it. JAX has no reverse mode for `jax.lax.while_loop`, so
    `optax.scale_by_zoom_linesearch` has only forward mode.

    Args:
        optimizer: a transformation of optax, `optax.MultiSteps`, or another object with ``init`` and ``update``.

    Raises:
        TypeError: if the optimizer has no ``init`` or ``update``.

    >>> import optax
    >>> def trained(x, rule):
    ...     state = rule.init(jax.numpy.zeros(2))
    ...     return rule.update(jax.numpy.array([1.0, 0.0]) * x, state)[0][0]
    >>> print(jax.grad(trained)(1.0, optax.adam(0.1, eps=0.5)))
    nan
    >>> print(jax.grad(trained)(1.0, differentiable(optax.adam(0.1, eps=0.5))).round(4))
    -0.0222
    """
    check_optimizer("optimizer", optimizer)
    rule: Any = optimizer
    if isinstance(rule.update, _Update):
        return rule
    if hasattr(rule, "_replace"):
        return rule._replace(update=_Update(rule.update))
    other = copy(rule)  # optax.MultiSteps, which has methods and no fields
    other.update = _Update(rule.update)
    return other


def is_optimizer(optimizer: object) -> bool:
    """Return whether an object has the methods of a transformation of optax."""
    return callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))


def check_optimizer(label: str, optimizer: object) -> None:
    """Raise a TypeError unless an object has the methods of a transformation of optax."""
    if not is_optimizer(optimizer):
        raise TypeError(
            f"{label}: expected an optimizer with init and update, such as optax.adam(1e-3), got "
            f"{type(optimizer).__name__}."
        )


@dataclass(frozen=True)
class _Update:
    """The update of an optimizer. Two of them are equal if they wrap the same update."""

    update: Callable[..., tuple[Any, Any]]

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        arrays, rest = split_arrays((updates, state, params, extra))

        def of_arrays(arrays: list[jax.Array]) -> tuple[Any, Any]:
            updates, state, params, extra = rest.join(arrays)
            return self.update(updates, state, params, **extra)

        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed, *arrays))
