"""Proximal Newton's method on working sets, for linear models with L1 and L2 penalties on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.linalg loads at its first use

from bilevel.problems.losses import Loss
from bilevel.search import quadratic_model as quadratic
from bilevel.search.quadratic_model import DECREASE, ROUNDING, Matrix, Products

SMALLEST_SET = 10  # features of the first working set
FORCING = 0.1  # of the violation: the accuracy of the quadratic model


@dataclass(frozen=True)
class LinearModel:
    """The objective Σᵢ shareᵢ loss(xᵢᵀw, yᵢ) + Σⱼ l1ⱼ |wⱼ| + ½ Σⱼ l2ⱼ wⱼ², for w of shape (d,) or (d, k).

    Attributes:
        loss: the loss of one example.
        X: data of shape (n, d), dense or scipy.sparse (CSC is the fastest).
        y: targets of shape (n,), or (n, k) for k targets.
        shares: the weight of each example in the mean, of shape (n,).
    """

    loss: Loss
    X: Any
    y: np.ndarray
    shares: np.ndarray

    def value(self, z: np.ndarray, w: np.ndarray, l1: np.ndarray, l2: np.ndarray) -> float:
        """Return the objective at w with predictions z."""
        return float((self.shares @ self.loss(z, self.y)).sum() + (l1 * np.abs(w) + 0.5 * l2 * w**2).sum())

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Return the gradient of the loss by w."""
        return self.X.T @ self._shared(self.loss.slopes(z, self.y))

    def bend(self, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """Return ∂²loss/∂z² dz of each example, times its share."""
        return self._shared(self.loss.bend(z, self.y, dz))

    def columns(self, features: np.ndarray) -> Any:
        """Return columns of X."""
        return self.X if len(features) == self.X.shape[1] else self.X[:, features]

    def quadratic_model(self, features: np.ndarray, columns: Any, z: np.ndarray, l2: np.ndarray) -> Matrix | Products:
        """Return the Hessian of the objective by the weights of some features."""
        gram = None
        n, d = self.X.shape
        if self.loss.constant_curvature and z.ndim == 1 and d <= min(n, quadratic.LARGEST_MATRIX):
            gram = self._gram if len(features) == d else self._gram[np.ix_(features, features)]
        return quadratic.quadratic_model(columns, lambda dz: self.bend(z, dz), l2, gram)

    @cached_property
    def _gram(self) -> np.ndarray:
        """Xᵀ C X of a loss with a constant curvature."""
        return quadratic.hessian(self.X, lambda dz: self.bend(dz, dz), ())

    def _shared(self, terms: np.ndarray) -> np.ndarray:
        return (self.shares if terms.ndim == 1 else self.shares[:, None]) * terms


class Fit(NamedTuple):
    """The result of `fit`.

    Attributes:
        w: params.
        violation: their largest violation of optimality.
        steps: the number of Newton steps.
        system: the matrix of the last step for all features. None: there was none.
    """

    w: np.ndarray
    violation: float
    steps: int
    system: Matrix | None = None


class Curvature:
    """The Hessian of the objective on the support of w, for systems with it."""

    def __init__(self, model: LinearModel, found: Fit, l1: np.ndarray, l2: np.ndarray) -> None:
        w = found.w
        self._support = (w != 0) | (l1 == 0)
        if self._support.all() and found.system is not None:
            self._system: Matrix | Products = found.system
            return
        features = np.flatnonzero(_any_output(self._support))
        columns = model.columns(features)
        self._system = model.quadratic_model(features, columns, columns @ w[features], l2[features])
        kept = np.flatnonzero(self._support[features].ravel())
        if isinstance(self._system, Products):
            self._diagonal = quadratic.positive(self._system.diagonal[kept])
        elif len(kept) < len(self._system.matrix):
            self._system = Matrix(self._system.matrix[np.ix_(kept, kept)])

    def solve(self, v: np.ndarray) -> np.ndarray:
        """Return H⁻¹ v on the support, and v elsewhere. If the support is large, divide by the diagonal of H."""
        result = v.copy()
        if isinstance(self._system, Products):
            result[self._support] /= self._diagonal
        elif self._support.any():
            result[self._support] = scipy.linalg.cho_solve(self._system.factor, v[self._support], check_finite=False)
        return result


def fit(model: LinearModel, l1: np.ndarray, l2: np.ndarray, w: np.ndarray, tol: float, maxiter: int) -> Fit:
    """Minimize the objective from w, until no entry violates the conditions of optimality by more than ``tol``.

    Each iteration minimizes a quadratic model of the objective over a working set: the support, and the features that
    violate optimality most (Johnson & Guestrin, ICML 2015; Massias, Gramfort & Salmon, ICML 2018). The set may double
    in each iteration. A line search makes the objective decrease (Lee, Sun & Saunders, SIAM J. Optim. 2014).

    Args:
        model: the data and the loss.
        l1, l2: penalties of each weight, in the shape of w, >= 0.
        w: the start, of shape (d,) or (d, k).
        tol: the largest violation, in the units of the gradient.
        maxiter: the maximum number of iterations.
    """
    w = w.copy()
    z = model.X @ w
    whole = None
    for steps in range(maxiter + 1):
        gradient = model.gradient(z) + l2 * w
        violations = _violations(gradient, w, l1)
        violation = float(violations.max(initial=0.0))
        if not violation > tol or steps == maxiter:  # also nan
            return Fit(w, violation, steps, whole)
        chosen = _working_set(violations, (w != 0) | (l1 == 0))
        columns, old = model.columns(chosen), w[chosen]
        system = model.quadratic_model(chosen, columns, z, l2[chosen])
        whole = system if isinstance(system, Matrix) and len(chosen) == len(w) else None
        accuracy = max(0.3 * tol, (0.0 if model.loss.constant_curvature else FORCING) * violation)
        slope, penalties = gradient[chosen], (l1[chosen], l2[chosen])
        target = quadratic.minimize_quadratic(system, slope.ravel(), old.ravel(), penalties[0].ravel(), accuracy)
        direction = target.reshape(old.shape) - old
        step = _line_search(model, z, old, direction, columns @ direction, slope, penalties)
        if step == 0:
            return Fit(w, violation, steps, whole)
        # An entry that becomes zero must be exactly zero.
        w[chosen] = target.reshape(old.shape) if step == 1 else old + step * direction
        z = columns @ w[chosen]
    raise AssertionError


def _violations(gradient: np.ndarray, w: np.ndarray, l1: np.ndarray) -> np.ndarray:
    """Return the distance of minus the gradient from the subdifferential of the L1 penalty, per entry."""
    return np.where(w != 0, np.abs(gradient + l1 * np.sign(w)), np.maximum(np.abs(gradient) - l1, 0))


def _working_set(violations: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the features of the support or without a penalty, and as many of the worst others."""
    support = _any_output(support)
    worst = violations if violations.ndim == 1 else violations.max(1)
    others = np.flatnonzero(~support & (worst > 0))
    room = max(SMALLEST_SET, np.count_nonzero(support))
    if len(others) > room:
        others = others[np.argpartition(-worst[others], room)[:room]]
    return np.union1d(np.flatnonzero(support), others)


def _any_output(mask: np.ndarray) -> Any:
    """Return which features have a true entry."""
    return mask if mask.ndim == 1 else mask.any(1)


def _line_search(
    model: LinearModel,
    z: np.ndarray,
    old: np.ndarray,
    direction: np.ndarray,
    dz: np.ndarray,
    slope: np.ndarray,
    penalties: tuple[np.ndarray, np.ndarray],
) -> float:
    """Return the first of 1, 1/2, 1/4, ... that decreases the objective enough. 0: none does."""
    if model.loss.constant_curvature:  # the quadratic model is exact
        return 1.0
    l1, _ = penalties
    start = model.value(z, old, *penalties)
    predicted = float((slope * direction + l1 * (np.abs(old + direction) - np.abs(old))).sum())
    step = 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        while step > 1e-10:
            value = model.value(z + step * dz, old + step * direction, *penalties)
            if value <= start + DECREASE * step * predicted + ROUNDING * abs(start):
                return step
            step /= 2
    return 0.0
