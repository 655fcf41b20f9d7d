"""Solve the inner problem of a ready linear model by Newton's method, in NumPy."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import scipy  # scipy.sparse loads at its first use

from bilevel.errors import SolverWarning
from bilevel.messages import callers_level
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

    It is for `bl.problems.lasso`, `elastic_net`, `sparse_logistic`, `ridge`, `logistic_regression`, `svm`, `huber` and
    `poisson`, with one or several outputs, and for a `bl.problems.k_fold` of one of them. Use it as the ``fit`` of
    `bl.minimize`. It is proximal Newton's method on working sets of features, so its time depends on the number of
    features with a weight, more than on d. With ``solver=bl.CG(preconditioner=fit.precondition)``, the linear solves
    need a few steps. For up to 1,500 weights that are not zero, `precondition` solves with the Hessian. For more, it
    divides by the diagonal of the Hessian.

    Args:
        problem: the problem.
        inner_args: ``(X, y)`` or ``(X, y, sample_weight)``, NumPy arrays; X of shape (n, d) may be scipy.sparse. y has
            shape (n,), or (n, k) for k targets.
        tol: the largest violation of the conditions of optimality, relative to the largest entry of the gradient of the
            loss at w = 0.
        maxiter: maximum number of Newton steps.

    Returns:
        The fit, a function with the method ``precondition``. ``params0`` is the start, of shape (d,) or (d, k). None:
        zeros, with one output for each target. So a softmax of k classes needs a start. The function warns
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
        for name, array in {"X": X, "y": y, "sample_weight": sample_weight}.items():
            if not isinstance(array, np.ndarray | None) and not (name == "X" and scipy.sparse.issparse(array)):
                raise TypeError(
                    f"{name}: newton_fit expects NumPy arrays, or scipy.sparse for X, got {type(array).__name__}. "
                    "Torch and JAX have bl.scipy_fit and bl.proximal_fit."
                )
        check_shape(y, X.shape[:1] + y.shape[1:])
        weights = np.ones(len(y), X.dtype) if sample_weight is None else sample_weight
        check_shape(weights, X.shape[:1], "sample_weight")
        columns = scipy.sparse.csc_array(X) if scipy.sparse.issparse(X) else np.asfortranarray(X)
        self._model = LinearModel(penalties.loss, columns, y, weights / weights.sum())
        self._penalties, self._tol, self._maxiter = penalties, tol, maxiter
        self._scales: dict[Any, float] = {}
        self._curvature: Curvature | None = None
        self._last: Any = None

    def __call__(self, hparams: Any, params0: Any) -> Any:
        X, y = self._model.X, self._model.y
        start: Any = np.zeros((X.shape[1], *y.shape[1:]), X.dtype) if params0 is None else np.asarray(params0)
        if start.ndim not in (1, 2) or start.shape[0] != X.shape[1]:
            raise ValueError(
                f"params0: newton_fit expects shape {X.shape[1:]} or ({X.shape[1]}, k), a row for each column of X, "
                f"got {start.shape}."
            )
        scale = self._scale(start.shape[1:])
        tol = max(self._tol, ROUNDING * float(np.finfo(X.dtype).eps)) * scale
        l1, l2 = self._penalties.of(start, hparams)
        found = fit(self._model, l1, l2, start, tol, self._maxiter)
        if not found.violation <= tol:
            _warn(found.steps, found.violation / scale, tol / scale)
        self._last, self._curvature = (found, l1, l2), None
        return found.w

    def _scale(self, outputs: tuple[int, ...]) -> float:
        """Return the largest entry of the gradient of the loss at w = 0."""
        if outputs not in self._scales:
            gradient = self._model.gradient(np.zeros((self._model.X.shape[0], *outputs), self._model.X.dtype))
            self._scales[outputs] = float(np.abs(gradient).max(initial=0.0))
        return self._scales[outputs]

    def precondition(self, v: Any) -> Any:
        if self._last is None:
            raise ValueError("precondition: the fit has not been called yet, so there is no Hessian.")
        found, l1, l2 = self._last
        if self._curvature is None:
            self._curvature = Curvature(self._model, found, l1, l2)
        scale = 1 + self._penalties.step_size * l2
        return scale * self._curvature.solve(scale * v)


def _warn(steps: int, violation: float, tol: float) -> None:
    if np.isfinite(violation):
        reason = f"The conditions of optimality are violated by {violation:.2g} (tol: {tol:.2g})."
        way_out = "raise maxiter or tol, use float64, or keep the hyperparameters within bounds"
    else:
        reason = "The gradient is not finite."
        way_out = "look for nan, infinite or huge numbers in the data, the hyperparameters and the start"
    message = (
        f"newton_fit stopped after {steps} Newton steps. {reason} A hypergradient needs an accurate minimum: {way_out}."
    )
    warnings.warn(SolverWarning(message), stacklevel=callers_level())
