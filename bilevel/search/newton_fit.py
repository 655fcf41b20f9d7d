"""Solve the inner problem of a ready linear model by Newton's method, in NumPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # scipy.sparse loads at its first use

from bilevel.errors import SolverWarning
from bilevel.problems.k_fold import KFoldProblem
from bilevel.problems.linear import linear_model
from bilevel.problems.losses import check_shape
from bilevel.search.proximal_newton import LinearModel, fit

ROUNDING = 100.0  # machine epsilons: the least tolerance


def newton_fit(
    problem: Any, *, inner_args: tuple[Any, ...], tol: float = 1e-8, maxiter: int = 100
) -> Callable[[Any, Any], Any]:
    """Return ``fit(hparams, params0) -> params`` for a ready linear model in NumPy, or its cross-validation.

    It is for one output: `bl.problems.ridge`, `logistic_regression`, `svm`, `huber`, `poisson` with params of shape
    (d,), and a `bl.problems.k_fold` of one of them. Use it as the ``fit`` of `bl.minimize`. It is proximal Newton's
    method on working sets of features, so its time depends on the number of features with a weight, more than on d.

    Args:
        problem: the problem.
        inner_args: ``(X, y)`` or ``(X, y, sample_weight)``, NumPy arrays; X of shape (n, d) may be scipy.sparse.
        tol: the largest violation of the conditions of optimality, relative to the largest entry of the gradient of the
            loss at w = 0.
        maxiter: maximum number of Newton steps.

    Returns:
        The function. ``params0`` is the start; None: zeros. It warns (`SolverWarning`) if the violation stays above
        ``tol``.

    Raises:
        TypeError: if the problem is no ready linear model with one output. `bl.scipy_fit` is for other smooth problems.
        ValueError: if the shapes of the data do not fit.

    >>> import numpy as np, bilevel as bl
    >>> fit = newton_fit(bl.problems.ridge(), inner_args=(np.eye(2), np.array([1.0, 2.0])))
    >>> fit(np.log(0.5) + np.zeros(()), None)
    array([0.5, 1. ])
    """
    if isinstance(problem, KFoldProblem):
        parts = problem.folds.training(inner_args)
        fits = [newton_fit(problem.problem, inner_args=part, tol=tol, maxiter=maxiter) for part in parts]

        def fit_folds(hparams: Any, params0: Any) -> Any:
            starts = [None] * len(fits) if params0 is None else params0
            return [fit_one(hparams, start) for fit_one, start in zip(fits, starts, strict=True)]

        return fit_folds
    data, penalties = linear_model(problem)
    X, y, *rest = inner_args
    check_shape(y, X.shape[:1])
    weights = np.ones(len(y), X.dtype) if not rest else rest[0]
    check_shape(weights, X.shape[:1], "sample_weight")
    columns = scipy.sparse.csc_array(X) if scipy.sparse.issparse(X) else np.asfortranarray(X)
    model = LinearModel(data.loss, columns, y, weights / weights.sum())
    scale = float(np.abs(model.gradient(np.zeros(len(y), X.dtype))).max(initial=0.0))
    accuracy = max(tol, ROUNDING * float(np.finfo(X.dtype).eps)) * scale

    def fit_one(hparams: Any, params0: Any) -> Any:
        start: Any = np.zeros(X.shape[1], X.dtype) if params0 is None else np.asarray(params0)
        if start.shape != X.shape[1:]:
            raise ValueError(
                f"params0: newton_fit expects shape {X.shape[1:]}, one weight for each column of X, got {start.shape}. "
                "For several outputs, use bl.scipy_fit."
            )
        found = fit(model, *penalties(start, hparams), start, accuracy, maxiter)
        if not found.violation <= accuracy:
            _warn(found.steps, found.violation / scale, accuracy / scale)
        return found.w

    return fit_one


def _warn(steps: int, violation: float, tol: float) -> None:
    message = (
        f"newton_fit stopped after {steps} Newton steps. The conditions of optimality are violated by {violation:.2g} "
        f"(tol: {tol:.2g}). A hypergradient needs an accurate minimum: raise maxiter or tol, use float64, or keep the "
        "hyperparameters within bounds."
    )
    warnings.warn(SolverWarning(message), stacklevel=3)
