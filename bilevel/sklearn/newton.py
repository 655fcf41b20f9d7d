"""Newton's method for penalized linear models on one training set."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import linalg, sparse
from scipy.sparse import linalg as sparse_linalg
from sklearn.exceptions import ConvergenceWarning

DENSE = 1000  # the largest number of coefficients for a dense Hessian
CG_RTOL = 1e-3  # of a Newton step by CG: each step then reduces the gradient by about this factor
MAXITER = 100
SOLVED = 1e-13  # of the loss: after a step with a smaller predicted decrease, the fit is exact up to rounding
ROUNDING = 1e-14  # of the loss


Solve = Callable[[np.ndarray], np.ndarray]
"""v -> H⁻¹ v, or an approximation of it, for vectors like params."""


@dataclass
class NewtonFit:
    """``fit(hparams, params0) -> params``, by Newton's method with a line search.

    Attributes:
        inner: the inner objective, of `bilevel.problems`.
        curvature: scores -> the second derivatives of the loss of each example by its scores, of shape (n,), or
            (n, k, k) for k scores. None: 1.
        X: shape (n, d), dense or sparse.
        y: shape (n,).
        sample_weight: shape (n,).
        precondition: solves with the Hessian of the last step, or only with its diagonal if there are many features.
    """

    inner: Any
    curvature: Callable[[np.ndarray], np.ndarray] | None
    X: Any
    y: np.ndarray
    sample_weight: np.ndarray
    precondition: Solve = lambda v: v

    def __call__(self, hparams: np.ndarray, params0: np.ndarray) -> np.ndarray:
        """Return the minimum. Issue a ConvergenceWarning if it is not found."""
        w, rows = params0, (self.X, self.y, self.sample_weight)
        for _ in range(MAXITER):
            loss, grad = float(self.inner(w, hparams, *rows)), self.inner.grad(w, hparams, *rows)
            step = self._step(w, hparams, grad)
            predicted = float((grad * step).sum())
            if predicted <= SOLVED * abs(loss):
                return w - step
            length, most = 1.0, loss + ROUNDING * abs(loss)
            while length > ROUNDING:
                if self.inner(w - length * step, hparams, *rows) <= most - 1e-4 * length * predicted:
                    break
                length /= 2
            w = w - length * step
        warnings.warn(ConvergenceWarning("A fit did not converge. Scale the features to similar sizes."), stacklevel=2)
        return w

    def _step(self, w: np.ndarray, hparams: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Return H⁻¹ grad."""
        penalties = np.broadcast_to(self.inner.penalties(w, hparams), w.shape)
        if w.size <= DENSE:
            self.precondition = _dense_solve(self._hessian(w, penalties))
            return self.precondition(grad)
        diagonal = self._diagonal(w) + penalties
        diagonal[diagonal <= 0] = 1.0
        self.precondition = lambda v: v / diagonal

        def product(v: np.ndarray) -> np.ndarray:
            return self.inner.hvp(w, hparams, v.reshape(w.shape), self.X, self.y, self.sample_weight).ravel()

        shape = (w.size, w.size)
        H: Any = sparse_linalg.LinearOperator(shape, product, dtype=w.dtype)  # pyright: ignore[reportCallIssue]
        M: Any = sparse.diags_array(1 / diagonal.ravel())
        return sparse_linalg.cg(H, grad.ravel(), rtol=CG_RTOL, M=M)[0].reshape(w.shape)

    def _hessian(self, w: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """Return the Hessian, of shape (w.size, w.size)."""
        if self.curvature is None:
            return self._gram + np.diag(penalties)
        weights = self.curvature(self.X @ w)
        if w.ndim == 1:
            return self._weighted(self._share * weights) + np.diag(penalties)
        k = w.shape[1]
        blocks = np.empty((k, k, len(w), len(w)))
        for a in range(k):
            for b in range(a + 1):
                blocks[a, b] = blocks[b, a] = self._weighted(self._share * weights[:, a, b])
        hessian = blocks.transpose(2, 0, 3, 1).reshape(w.size, w.size) + np.diag(penalties.ravel())
        # A common shift of the weights of all classes changes no probability. The gradient has no part along it.
        shifts = np.kron(np.diag(penalties[:, 0] == 0), np.ones((k, k)))
        return hessian + shifts * np.abs(hessian).max()

    @cached_property
    def _gram(self) -> np.ndarray:
        return self._weighted(self._share)

    @cached_property
    def _share(self) -> np.ndarray:
        return self.sample_weight / self.sample_weight.sum()

    def _weighted(self, weights: np.ndarray) -> np.ndarray:
        """Return Xᵀ diag(weights) X."""
        if isinstance(self.X, np.ndarray):
            return self.X.T @ (weights[:, None] * self.X)
        return (self.X.T @ (sparse.diags_array(weights) @ self.X)).toarray()

    def _diagonal(self, w: np.ndarray) -> np.ndarray:
        """Return the diagonal of the Hessian without the penalties, in the shape of w."""
        squares = self.X**2 if isinstance(self.X, np.ndarray) else self.X.multiply(self.X)
        if self.curvature is None:
            return squares.T @ self._share
        weights = self.curvature(self.X @ w)
        diagonal = weights if w.ndim == 1 else np.diagonal(weights, axis1=1, axis2=2)
        return squares.T @ (diagonal.T * self._share).T


def _dense_solve(hessian: np.ndarray) -> Solve:
    try:
        factor = linalg.cho_factor(hessian)
    except linalg.LinAlgError:  # singular by rounding: the features are far from similar sizes
        inverse = linalg.pinvh(hessian)
        return lambda v: (inverse @ v.ravel()).reshape(v.shape)
    return lambda v: linalg.cho_solve(factor, v.ravel()).reshape(v.shape)
