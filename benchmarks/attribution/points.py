"""The derivatives of the inner and outer objectives at the end of a run, as dense matrices."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.attribution.networks import NETWORKS, Digits, Network, losses
from benchmarks.attribution.runs import Objectives


class Point(NamedTuple):
    """Derivatives at weights w, with a weight λᵢ = 1 for each example.

    Attributes:
        value: L.
        grad: ∂L/∂w, of shape (n,).
        cross: ∂²L/∂λ∂w, of shape (examples, n).
        hessian, gauss_newton: ∂²L/∂w² and its approximation, of shape (n, n).
        outer_values: the objectives F.
        rhs: their gradients ∂F/∂w, of shape (objectives, n).
    """

    value: float
    grad: np.ndarray
    cross: np.ndarray
    hessian: np.ndarray
    gauss_newton: np.ndarray
    outer_values: np.ndarray
    rhs: np.ndarray


@cache
def network(name: str) -> Network:
    """Return a network of the table, always the same object, so that JAX compiles its functions once."""
    return NETWORKS[name]()


@cache
def _derivatives(name: str) -> Callable[..., tuple[Array, ...]]:
    logits = network(name).logits

    def of_example(w: Array, x: Array, y: Array) -> Array:
        return losses(logits(w, x[None]), y[None])[0]

    def half_of_gauss_newton(w: Array, x: Array) -> Array:
        """Return A J with AᵀA = ∂²loss/∂output² = diag(p) − p pᵀ, of shape (10, n)."""
        root = jnp.sqrt(jax.nn.softmax(logits(w, x[None])[0]))
        return (jnp.diag(root) - jnp.outer(root, root**2)) @ jax.jacrev(lambda w: logits(w, x[None])[0])(w)

    @jax.jit
    def at(w: Array, x: Array, y: Array) -> tuple[Array, ...]:
        value, grad = jax.value_and_grad(lambda w: losses(logits(w, x), y).mean())(w)
        product = jax.linearize(jax.grad(lambda w: losses(logits(w, x), y).mean()), w)[1]
        hessian = jax.lax.map(product, jnp.eye(len(w)))
        cross = jax.vmap(jax.grad(of_example), (None, 0, 0))(w, x, y) / len(y)
        halves = jax.vmap(half_of_gauss_newton, (None, 0))(w, x).reshape(-1, len(w))
        return value, grad, cross, hessian, halves.T @ halves / len(y)

    return at


def point(name: str, data: Digits, w: np.ndarray, objectives: Objectives) -> Point:
    """Return the derivatives at w."""
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    value, grad, cross, *matrices = _derivatives(name)(jnp.asarray(w), x, y)
    hessian, gauss_newton = ((matrix + matrix.T) / 2 for matrix in map(np.asarray, matrices))
    outer = jax.jit(objectives)(jnp.asarray(w)), jax.jit(jax.jacrev(objectives))(jnp.asarray(w))
    outer_values, rhs = map(np.asarray, outer)
    return Point(float(value), np.asarray(grad), np.asarray(cross), hessian, gauss_newton, outer_values, rhs)


class Spectral(NamedTuple):
    """A curvature in the basis of its eigenvectors, where a product is elementwise. Solvers take the same steps there.

    Attributes:
        values: eigenvalues, ascending, of shape (n,).
        rhs, cross, grad: as in `Point`, in this basis.
        outer_values: as in `Point`.
    """

    values: np.ndarray
    rhs: np.ndarray
    cross: np.ndarray
    grad: np.ndarray
    outer_values: np.ndarray


def spectral(point: Point, matrix: np.ndarray) -> Spectral:
    """Return the derivatives in the basis of the eigenvectors of the Hessian or its approximation."""
    values, vectors = np.linalg.eigh(matrix)
    rhs, cross, grad = (each @ vectors for each in (point.rhs, point.cross, point.grad))
    return Spectral(values, rhs, cross, grad, point.outer_values)
