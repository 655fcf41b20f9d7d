"""Solve the inner problem of a ready linear model by Newton's method, in NumPy."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import scipy  # scipy.sparse loads at its first use

from bilevel.errors import SolverWarning
from bilevel.problems.k_fold import KFoldProblem
from bilevel.problems.linear import Penalties, linear_model
from bilevel.problems.losses import check_shape
from bilevel.search.proximal_newton import Curvature, LinearModel, fit

ROUNDING = 100.0  # machine epsilons: the least tolerance


class Fit(Protocol):
    """The result of `bl.newton_fit`: a ``fit`` for `bl.minimize`, and a preconditioner for its linear solves."""

    def __call__(self, hparams: Any, params0: Any) -> Any:
        """Return the minimum. ``params0`` is the start; None: zeros."""
        ...

    def precondition(self, v: Any) -> Any:
        """Return A⁻¹ v for v like params, with the matrix A of the linear system at the last minimum."""
        ...


def newton_fit(problem: Any, *, inner_args: tuple[Any, ...], tol: float = 1e-8, maxiter: int = 100) -> Fit:
    """Return ``fit(hparams, params0) -> params`` for a ready linear model in NumPy, or its cross-validation.

    It is for models with params of shape (d,): `bl.problems.lasso`, `elastic_net`, `sparse_logistic`, `ridge`,
    `logistic_regression`, `svm`, `huber` and `poisson`, and for a `bl.problems.k_fold` of one of them. Use it as the
    ``fit`` of `bl.minimize`. It is proximal Newton's method on working sets of features, so its time depends on the
    number of features with a weight, more than on d. With ``solver=bl.CG(preconditioner=fit.precondition)``, the linear
    solves need a few steps, since the Hessian of the last Newton step is at hand.

    Args:
        problem: the problem.
        inner_args: ``(X, y)`` or ``(X, y, sample_weight)``, NumPy arrays; X of shape (n, d) may be scipy.sparse.
        tol: the largest violation of the conditions of optimality, relative to the largest entry of the gradient of the
            loss at w = 0.
        maxiter: maximum number of Newton steps.

    Returns:
        The fit, a function with the method ``precondition``. ``params0`` is the start; None: zeros. It warns
        (`SolverWarning`) if the violation stays above ``tol``.

    Raises:
        TypeError: if the problem is no ready linear model. `bl.scipy_fit` is for other smooth problems, and
            `bl.proximal_fit` for other proximal problems.
        ValueError: if the shapes of the data do not fit.

    >>> import numpy as np, bilevel as bl
    >>> fit = newton_fit(bl.problems.ridge(), inner_args=(np.eye(2), np.array([1.0, 2.0])))
    >>> fit(np.log(0.5) + np.zeros(()), None)
    array([0.5, 1. ])
    """
    if isinstance(problem, KFoldProblem):
        parts = problem.folds.training(inner_args)
        return _FoldFits([newton_fit(problem.problem, inner_args=part, tol=tol, maxiter=maxiter) for part in parts])
    return _ModelFit(linear_model(problem), *inner_args, tol=tol, maxiter=maxiter)


class _FoldFits:
    """The fits of all folds, on lists of params."""

    def __init__(self, fits: list[Fit]) -> None:
        self._fits = fits

    def __call__(self, hparams: Any, params0: Any) -> Any:
        starts = [None] * len(self._fits) if params0 is None else params0
        return [fit(hparams, start) for fit, start in zip(self._fits, starts, strict=True)]

    def precondition(self, v: Any) -> Any:
        return [fit.precondition(part) for fit, part in zip(self._fits, v, strict=True)]


class _ModelFit:
    """The fit of one model."""

    def __init__(
        self,
        penalties: Penalties,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        tol: float,
        maxiter: int,
    ) -> None:
        check_shape(y, X.shape[:1])
        weights = np.ones(len(y), X.dtype) if sample_weight is None else sample_weight
        check_shape(weights, X.shape[:1], "sample_weight")
        columns = scipy.sparse.csc_array(X) if scipy.sparse.issparse(X) else np.asfortranarray(X)
        self._model = LinearModel(penalties.loss, columns, y, weights / weights.sum())
        self._penalties, self._maxiter = penalties, maxiter
        self._scale = float(np.abs(self._model.gradient(np.zeros(len(y), X.dtype))).max(initial=0.0))
        self._tol = max(tol, ROUNDING * float(np.finfo(X.dtype).eps)) * self._scale
        self._curvature: Curvature | None = None
        self._last: Any = None

    def __call__(self, hparams: Any, params0: Any) -> Any:
        X = self._model.X
        start: Any = np.zeros(X.shape[1], X.dtype) if params0 is None else np.asarray(params0)
        if start.shape != X.shape[1:]:
            raise ValueError(
                f"params0: newton_fit expects shape {X.shape[1:]}, one weight for each column of X, got {start.shape}. "
                "For several outputs, use bl.scipy_fit."
            )
        l1, l2 = self._penalties.of(start, hparams)
        found = fit(self._model, l1, l2, start, self._tol, self._maxiter)
        if not found.violation <= self._tol:
            _warn(found.steps, found.violation / self._scale, self._tol / self._scale)
        self._last, self._curvature = (found.w, l2), None
        return found.w

    def precondition(self, v: Any) -> Any:
        if self._last is None:
            raise ValueError("precondition: the fit has not been called yet, so there is no Hessian.")
        w, l2 = self._last
        if self._curvature is None:
            self._curvature = Curvature(self._model, w, l2)
        scale = 1 + self._penalties.step_size * l2
        return scale * self._curvature.solve(scale * v)


def _warn(steps: int, violation: float, tol: float) -> None:
    message = (
        f"newton_fit stopped after {steps} Newton steps. The conditions of optimality are violated by {violation:.2g} "
        f"(tol: {tol:.2g}). A hypergradient needs an accurate minimum: raise maxiter or tol, use float64, or keep the "
        "hyperparameters within bounds."
    )
    warnings.warn(SolverWarning(message), stacklevel=4)
