"""Minimize a quadratic function plus an L1 penalty: the step of proximal Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.linalg and scipy.sparse load at their first use

from bilevel.prox.operator import soft_threshold

LARGEST_MATRIX = 1500  # rows: a larger system is solved by CG, without the matrix
DAMPING = 1e-2  # of a Newton step, times the largest violation: singular systems get a bounded step
SMALLEST_STEP = 1e-6  # of a line search
CEILING = 1e-3  # of the mean curvature: the largest damping
RIDGE = 1e-9  # of the diagonal, added to it: systems may be singular, and must not amplify rounding in a null space
ROUNDING = 1e-15  # of an objective: near the minimum, a smaller decrease is hidden by rounding
DECREASE = 1e-3  # of the predicted decrease: what a step must reach

Bend = Callable[[np.ndarray], np.ndarray]
"""dz -> the second derivative of the loss of the rows, in the direction dz of shape (n,) or (n, k)."""


class Matrix:
    """A symmetric matrix. It keeps its Cholesky factor."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    @property
    def diagonal(self) -> np.ndarray:
        return self.matrix.diagonal()

    @cached_property
    def factor(self) -> Any:
        """The Cholesky factor, for `scipy.linalg.cho_solve`."""
        return factorized(self.matrix, 0.0)

    def product(self, v: np.ndarray) -> np.ndarray:
        return self.matrix @ v

    def solve(self, subset: np.ndarray, damping: float, b: np.ndarray, accuracy: float) -> np.ndarray:
        """Solve the rows and columns of a subset, plus damping times the identity."""
        whole = len(subset) == len(self.matrix)
        part = self.matrix if whole else self.matrix[np.ix_(subset, subset)]
        factor = self.factor if whole and not damping else factorized(part, damping)
        return scipy.linalg.cho_solve(factor, b, check_finite=False)


class Products(NamedTuple):
    """The matrix Aᵀ C A + diag(l2), by products, for vectors of shape (m k,).

    Attributes:
        A: columns of the data, of shape (n, m).
        bend: the product with C.
        l2: shape (m,) or (m, k).
        diagonal: the diagonal of the matrix, of shape (m k,).
    """

    A: Any
    bend: Bend
    l2: np.ndarray
    diagonal: np.ndarray

    def product(self, v: np.ndarray) -> np.ndarray:
        V = v.reshape(self.l2.shape)
        return (self.A.T @ self.bend(self.A @ V) + self.l2 * V).ravel()

    def solve(self, subset: np.ndarray, damping: float, b: np.ndarray, accuracy: float) -> np.ndarray:
        """Solve the rows and columns of a subset, plus damping times the identity, by CG."""
        full = np.zeros_like(self.diagonal)

        def product(v: np.ndarray) -> np.ndarray:
            full[subset] = v
            return self.product(full)[subset] + damping * v

        shape = (len(subset),) * 2
        operator = scipy.sparse.linalg.LinearOperator(shape, matvec=product, dtype=b.dtype)
        scaling = scipy.sparse.diags_array(1 / (positive(self.diagonal[subset]) + damping))
        return scipy.sparse.linalg.cg(operator, b, rtol=0.1, atol=accuracy, maxiter=1000, M=scaling)[0]


def quadratic_model(columns: Any, bend: Bend, l2: np.ndarray, gram: np.ndarray | None = None) -> Matrix | Products:
    """Return Aᵀ C A + diag(l2), as a matrix if it is small.

    Args:
        columns: A, of shape (n, m), dense or scipy.sparse.
        bend: the product with C.
        l2: shape (m,) or (m, k).
        gram: Aᵀ C A, if it is known.
    """
    if gram is None and l2.size > LARGEST_MATRIX:
        return Products(columns, bend, l2, _diagonal(columns, bend, l2))
    matrix = hessian(columns, bend, l2.shape[1:]) if gram is None else gram.copy()
    _add_to_diagonal(matrix, l2.ravel())
    return Matrix(matrix)


def hessian(columns: Any, bend: Bend, outputs: tuple[int, ...]) -> np.ndarray:
    """Return Aᵀ C A, of shape (m k, m k), from the products of C with unit vectors."""
    n, m = columns.shape
    if not outputs:
        return _weighted_gram(columns, bend(np.ones(n, columns.dtype)))
    [k] = outputs
    blocks = np.zeros((m, k, m, k), columns.dtype)
    for b in range(k):
        weights = bend(_unit(columns, k, b))
        for a in range(b + 1):
            if weights[:, a].any():
                blocks[:, a, :, b] = blocks[:, b, :, a] = _weighted_gram(columns, weights[:, a])
    return blocks.reshape(m * k, m * k)


def _diagonal(columns: Any, bend: Bend, l2: np.ndarray) -> np.ndarray:
    squares = columns.multiply(columns) if scipy.sparse.issparse(columns) else columns**2
    if l2.ndim == 1:
        weights = bend(np.ones(columns.shape[0], columns.dtype))
    else:
        k = l2.shape[1]
        weights = np.stack([bend(_unit(columns, k, b))[:, b] for b in range(k)], axis=1)
    return (squares.T @ weights + l2).ravel()


def _unit(columns: Any, k: int, b: int) -> np.ndarray:
    unit = np.zeros((columns.shape[0], k), columns.dtype)
    unit[:, b] = 1
    return unit


def _weighted_gram(columns: Any, weights: np.ndarray) -> np.ndarray:
    """Return Aᵀ diag(weights) A."""
    if scipy.sparse.issparse(columns):
        return (columns.T @ (scipy.sparse.diags_array(weights) @ columns)).toarray()
    return columns.T @ (weights[:, None] * columns)


def _add_to_diagonal(matrix: np.ndarray, values: np.ndarray) -> None:
    np.einsum("ii->i", matrix)[:] += values


def positive(diagonal: np.ndarray) -> np.ndarray:
    """Return the diagonal with 1 in place of entries that are not positive."""
    return np.where(diagonal > 0, diagonal, 1)


def factorized(matrix: np.ndarray, damping: float) -> Any:
    """Return the Cholesky factor of a matrix plus damping times the identity, for `scipy.linalg.cho_solve`.

    The matrix is positive semidefinite. A small multiple of its diagonal is added.
    """
    diagonal, ridge = matrix.diagonal(), max(RIDGE, 10 * float(np.finfo(matrix.dtype).eps))
    while True:
        damped = matrix.copy()
        _add_to_diagonal(damped, damping + ridge * positive(diagonal))
        try:
            return scipy.linalg.cho_factor(damped, overwrite_a=True, check_finite=False)
        except scipy.linalg.LinAlgError:  # singular by rounding
            if not ridge < 1:
                raise
            ridge *= 100


def minimize_quadratic(
    system: Matrix | Products, gradient: np.ndarray, start: np.ndarray, l1: np.ndarray, tol: float, maxiter: int = 200
) -> np.ndarray:
    """Return argmin over u of gradient·(u − start) + ½ (u − start)ᵀ G (u − start) + Σ l1 |u|.

    Each step is a Newton step in one orthant, projected onto this orthant (Andrew & Gao, ICML 2007, with the Hessian
    itself). Signs of the gradient choose the orthant for entries that are zero. The damping follows the violation, so
    singular systems give bounded steps and the convergence stays superlinear.
    """
    u, slope, value = start.copy(), gradient.copy(), l1 @ np.abs(start)
    penalized = l1 > 0
    ceiling = CEILING * float(system.diagonal.mean()) if penalized.any() else 0.0
    for _ in range(maxiter):
        signs = np.where((u != 0) | ~penalized, np.sign(u), -np.sign(slope) * (np.abs(slope) > l1))
        free = (signs != 0) | ~penalized
        descent = np.where(free, slope + l1 * signs, 0.0)
        violation = np.abs(descent).max(initial=0.0)
        if not violation > tol:
            break
        subset = np.flatnonzero(free)
        newton = -system.solve(subset, min(ceiling, DAMPING * violation), descent[subset], 0.1 * tol)
        step = 1.0
        while step > SMALLEST_STEP:
            moved = u[subset] + step * newton
            moved[(moved * signs[subset] < 0) & penalized[subset]] = 0.0
            new = u.copy()
            new[subset] = moved
            new_slope = gradient + system.product(new - start)
            new_value = 0.5 * (new - start) @ (gradient + new_slope) + l1 @ np.abs(new)
            if new_value <= value + DECREASE * (descent[subset] @ (moved - u[subset])) + ROUNDING * (l1 @ np.abs(u)):
                break
            step /= 2
        else:  # a tiny entry stands in the way of the others
            new = _proximal_step(u, slope, l1, float(system.diagonal.sum()))
            new_slope = gradient + system.product(new - start)
            new_value = 0.5 * (new - start) @ (gradient + new_slope) + l1 @ np.abs(new)
            if not new_value < value:
                return u
        u, slope, value = new, new_slope, new_value
    return u


def _proximal_step(u: np.ndarray, slope: np.ndarray, l1: np.ndarray, largest: float) -> np.ndarray:
    """Return a step of the proximal gradient method. ``largest`` is a bound of the eigenvalues."""
    return soft_threshold(u - slope / largest, l1 / largest)
