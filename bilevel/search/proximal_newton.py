"""Proximal Newton's method on working sets, for linear models with L1 and L2 penalties on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.linalg and scipy.sparse load at their first use

from bilevel.problems.losses import Loss

LARGEST_MATRIX = 1500  # rows: a larger system is solved by CG, without the matrix
SMALLEST_SET = 10  # features of the first working set
DAMPING = 1e-2  # of a Newton step, times the largest violation: singular systems get a bounded step
CEILING = 1e-3  # of the mean curvature: the largest damping
FORCING = 0.1  # of the violation: the accuracy of the quadratic model
ROUNDING = 1e-15  # of an objective: near the minimum, a smaller decrease is hidden by rounding
DECREASE = 1e-3  # of the predicted decrease: what a step must reach


@dataclass(frozen=True)
class LinearModel:
    """The objective Σᵢ shareᵢ loss(xᵢᵀw, yᵢ) + Σⱼ l1ⱼ |wⱼ| + ½ Σⱼ l2ⱼ wⱼ².

    Attributes:
        loss: the loss of one example.
        X: data of shape (n, d), dense or scipy.sparse (CSC is the fastest).
        y: targets of shape (n,).
        shares: the weight of each example in the mean, of shape (n,).
    """

    loss: Loss
    X: Any
    y: np.ndarray
    shares: np.ndarray

    def value(self, z: np.ndarray, w: np.ndarray, l1: np.ndarray, l2: np.ndarray) -> float:
        """Return the objective at w with predictions z."""
        return float(self.shares @ self.loss(z, self.y) + l1 @ np.abs(w) + 0.5 * (l2 * w) @ w)

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Return the gradient of the loss by w."""
        return self.X.T @ (self.shares * self.loss.slopes(z, self.y))

    def curvatures(self, z: np.ndarray) -> np.ndarray:
        """Return ∂²loss/∂z² of each example, times its share."""
        return self.shares * self.loss.bend(z, self.y, np.ones_like(z))


class Fit(NamedTuple):
    """The result of `fit`: params, their largest violation of optimality, and the number of Newton steps."""

    w: np.ndarray
    violation: float
    steps: int


class Curvature:
    """The Hessian of the objective on the support of w, for systems with it."""

    def __init__(self, model: LinearModel, w: np.ndarray, l2: np.ndarray) -> None:
        self.support = np.flatnonzero(w)
        columns = model.X[:, self.support]
        curvatures = model.curvatures(columns @ w[self.support])
        system = quadratic_model(columns, curvatures, l2[self.support])
        self._factor: Any = None
        if isinstance(system, _Matrix) and system.size:
            damped = system.damped(1e-12 * system.mean_diagonal())
            self._factor = scipy.linalg.cho_factor(damped, check_finite=False)

    def solve(self, v: np.ndarray) -> np.ndarray:
        """Return H⁻¹ v on the support, and v elsewhere. If the support is large, return v."""
        if self._factor is None:
            return v
        result = v.copy()
        result[self.support] = scipy.linalg.cho_solve(self._factor, v[self.support], check_finite=False)
        return result


def fit(model: LinearModel, l1: np.ndarray, l2: np.ndarray, w: np.ndarray, tol: float, maxiter: int) -> Fit:
    """Minimize the objective from w, until no entry violates the conditions of optimality by more than ``tol``.

    Each iteration minimizes a quadratic model of the objective over a working set: the support, and the features that
    violate optimality most (Johnson & Guestrin, ICML 2015; Massias, Gramfort & Salmon, ICML 2018). The set may double
    in each iteration. A line search makes the objective decrease (Lee, Sun & Saunders, SIAM J. Optim. 2014).

    Args:
        model: the data and the loss.
        l1, l2: penalties of each feature, of shape (d,), >= 0.
        w: the start, of shape (d,).
        tol: the largest violation, in the units of the gradient.
        maxiter: the maximum number of iterations.
    """
    w = w.copy()
    z = model.X @ w
    for steps in range(maxiter + 1):
        gradient = model.gradient(z) + l2 * w
        violations = _violations(gradient, w, l1)
        violation = float(violations.max(initial=0.0))
        if not violation > tol or steps == maxiter:  # also nan
            return Fit(w, violation, steps)
        chosen = _working_set(violations, (w != 0) | (l1 == 0))
        columns = model.X[:, chosen]
        system = quadratic_model(columns, model.curvatures(z), l2[chosen])
        accuracy = max(0.3 * tol, (0.0 if model.loss.constant_curvature else FORCING) * violation)
        target = minimize_quadratic(system, gradient[chosen], w[chosen], l1[chosen], accuracy)
        step = _line_search(model, w, z, chosen, target - w[chosen], columns @ (target - w[chosen]), gradient, l1, l2)
        if step == 0:
            return Fit(w, violation, steps)
        w[chosen] = target if step == 1 else w[chosen] + step * (target - w[chosen])
        z = columns @ w[chosen]
    raise AssertionError


def _violations(gradient: np.ndarray, w: np.ndarray, l1: np.ndarray) -> np.ndarray:
    """Return the distance of minus the gradient from the subdifferential of the L1 penalty, per entry."""
    return np.where(w != 0, np.abs(gradient + l1 * np.sign(w)), np.maximum(np.abs(gradient) - l1, 0))


def _working_set(violations: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the indices of the support and of all features without a penalty, and of as many of the worst others."""
    others = np.flatnonzero(~support & (violations > 0))
    room = max(SMALLEST_SET, np.count_nonzero(support))
    if len(others) > room:
        others = others[np.argpartition(-violations[others], room)[:room]]
    return np.union1d(np.flatnonzero(support), others)


def _line_search(
    model: LinearModel,
    w: np.ndarray,
    z: np.ndarray,
    chosen: np.ndarray,
    direction: np.ndarray,
    dz: np.ndarray,
    gradient: np.ndarray,
    l1: np.ndarray,
    l2: np.ndarray,
) -> float:
    """Return the first of 1, 1/2, 1/4, ... that decreases the objective enough. 0: none does."""
    if model.loss.constant_curvature:  # the quadratic model is exact
        return 1.0
    old, l1, l2 = w[chosen], l1[chosen], l2[chosen]
    start = model.value(z, old, l1, l2)
    predicted = gradient[chosen] @ direction + l1 @ (np.abs(old + direction) - np.abs(old))
    step = 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        while step > 1e-10:
            value = model.value(z + step * dz, old + step * direction, l1, l2)
            if value <= start + DECREASE * step * predicted + ROUNDING * abs(start):
                return step
            step /= 2
    return 0.0


class _Matrix(NamedTuple):
    """A symmetric matrix."""

    matrix: np.ndarray

    @property
    def size(self) -> int:
        return len(self.matrix)

    def mean_diagonal(self) -> float:
        return float(np.trace(self.matrix)) / self.size

    def damped(self, damping: float) -> np.ndarray:
        return self.matrix + damping * np.eye(self.size)

    def product(self, v: np.ndarray) -> np.ndarray:
        return self.matrix @ v

    def solve(self, subset: np.ndarray, damping: float, b: np.ndarray, accuracy: float) -> np.ndarray:
        """Solve the rows and columns of a subset, plus damping times the identity."""
        part = _Matrix(self.matrix[np.ix_(subset, subset)]).damped(damping)
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(part, check_finite=False), b, check_finite=False)


class _Products(NamedTuple):
    """The matrix Aᵀ diag(curvatures) A + diag(l2), by products."""

    A: Any
    curvatures: np.ndarray
    l2: np.ndarray

    @property
    def size(self) -> int:
        return len(self.l2)

    def mean_diagonal(self) -> float:
        squares = self.A.multiply(self.A) if scipy.sparse.issparse(self.A) else self.A**2
        return float((self.curvatures @ squares).sum() + self.l2.sum()) / self.size

    def product(self, v: np.ndarray) -> np.ndarray:
        return self.A.T @ (self.curvatures * (self.A @ v)) + self.l2 * v

    def solve(self, subset: np.ndarray, damping: float, b: np.ndarray, accuracy: float) -> np.ndarray:
        """Solve the rows and columns of a subset, plus damping times the identity, by CG."""
        part = _Products(self.A[:, subset], self.curvatures, self.l2[subset] + damping)
        operator = scipy.sparse.linalg.LinearOperator((len(subset),) * 2, matvec=part.product, dtype=b.dtype)
        return scipy.sparse.linalg.cg(operator, b, rtol=0.1, atol=accuracy, maxiter=1000)[0]


def quadratic_model(columns: Any, curvatures: np.ndarray, l2: np.ndarray) -> _Matrix | _Products:
    """Return Aᵀ diag(curvatures) A + diag(l2), as a matrix where it is small."""
    if len(l2) > LARGEST_MATRIX:
        return _Products(columns, curvatures, l2)
    if scipy.sparse.issparse(columns):
        weighted = scipy.sparse.diags_array(curvatures) @ columns
        matrix = (columns.T @ weighted).toarray()
    else:
        matrix = columns.T @ (curvatures[:, None] * columns)
    matrix[np.diag_indices_from(matrix)] += l2
    return _Matrix(matrix)


def minimize_quadratic(
    system: _Matrix | _Products, gradient: np.ndarray, start: np.ndarray, l1: np.ndarray, tol: float, maxiter: int = 200
) -> np.ndarray:
    """Return argmin over u of gradient·(u − start) + ½ (u − start)ᵀ G (u − start) + Σ l1 |u|.

    Each step is a Newton step in one orthant, projected onto this orthant (Andrew & Gao, ICML 2007, with the Hessian
    itself). Signs of the gradient choose the orthant for entries that are zero. The damping follows the violation, so
    singular systems give bounded steps and the convergence stays superlinear.
    """
    u, slope, value = start.copy(), gradient.copy(), l1 @ np.abs(start)
    ceiling = CEILING * system.mean_diagonal()
    for _ in range(maxiter):
        penalized = l1 > 0
        signs = np.where((u != 0) | ~penalized, np.sign(u), -np.sign(slope) * (np.abs(slope) > l1))
        free = (signs != 0) | ~penalized
        descent = np.where(free, slope + l1 * signs, 0.0)
        violation = np.abs(descent).max(initial=0.0)
        if not violation > tol:
            break
        subset = np.flatnonzero(free)
        damping = min(ceiling, DAMPING * violation) + 1e-9 * ceiling
        newton = -system.solve(subset, damping, descent[subset], 0.1 * tol)
        step = 1.0
        while True:
            moved = u[subset] + step * newton
            moved[(moved * signs[subset] < 0) & penalized[subset]] = 0.0
            new = u.copy()
            new[subset] = moved
            new_slope = gradient + system.product(new - start)
            new_value = 0.5 * (new - start) @ (gradient + new_slope) + l1 @ np.abs(new)
            if new_value <= value + DECREASE * (descent[subset] @ (moved - u[subset])) + ROUNDING * (l1 @ np.abs(u)):
                break
            step /= 2
            if step < 1e-10:
                return u
        u, slope, value = new, new_slope, new_value
    return u
