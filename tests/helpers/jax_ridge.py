"""A ridge regression in JAX with a penalty per weight, and points of it."""

from typing import Any

import jax
import jax.numpy as jnp

import bilevel as bl


def inner(w, h, X, y):
    return jnp.mean((X @ w - y) ** 2) + jnp.sum(jnp.exp(h) * w**2)


def outer(w, h, X, y):
    return jnp.mean((X @ w - y) ** 2)


PROBLEM = bl.Problem(inner, outer)


def point(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Return random params, hparams, inner data and outer data."""
    keys = jax.random.split(jax.random.key(seed), 6)
    X, X_val = (jax.random.normal(k, (12, 4)) for k in keys[:2])
    y, y_val = (jax.random.normal(k, (12,)) for k in keys[2:4])
    w, h = (jax.random.normal(k, (4,)) for k in keys[4:])
    return w, h, (X, y), (X_val, y_val)
