"""Ridge regression for `implicit_minimizer`, whose minimizer JAX can differentiate in closed form."""

import jax
import jax.numpy as jnp

ROWS = 12


def inner(w, h, X, y, *ignored):
    return jnp.mean((X @ w["w"] - y) ** 2) + jnp.sum(jnp.exp(h["decay"]) * w["w"] ** 2)


def ridge(h, X, y, *ignored):
    """The minimizer in closed form, which JAX can differentiate in any way."""
    return {"w": jnp.linalg.solve(X.T @ X / ROWS + jnp.diag(jnp.exp(h["decay"])), X.T @ y / ROWS)}


def data():
    """Return hyperparameters, training data, and the validation loss."""
    keys = jax.random.split(jax.random.key(0), 6)
    X, X_val = (jax.random.normal(k, (ROWS, 3)) for k in keys[:2])
    y, y_val = (jax.random.normal(k, (ROWS,)) for k in keys[2:4])
    return {"decay": jax.random.normal(keys[4], (3,))}, X, y, lambda w: jnp.mean((X_val @ w["w"] - y_val) ** 2)
