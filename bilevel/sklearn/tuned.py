"""The search for penalties that estimators share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.utils.validation import _check_sample_weight

from bilevel.linear_solvers.cg import CG
from bilevel.problems.k_fold import k_fold
from bilevel.problems.problem import Problem
from bilevel.search.evaluations import Evaluation
from bilevel.search.minimize import minimize
from bilevel.sklearn.newton import NewtonFit
from bilevel.spaces.array import Args

START = 1.0  # the first alpha of a search


class Design(NamedTuple):
    """The features of a linear model as the search uses them, with a column of ones for the intercept.

    Dense features are centered, so that the solves are well conditioned. The intercept has no penalty, so the fit is
    the same.
    """

    X: Any
    means: np.ndarray
    fit_intercept: bool

    @classmethod
    def of(cls, X: Any, sample_weight: np.ndarray, fit_intercept: bool) -> Design:
        """Return the design of features of shape (n, d)."""
        if not fit_intercept:
            return cls(X, np.zeros(X.shape[1]), False)
        ones = np.ones((X.shape[0], 1))
        if sparse.issparse(X):
            return cls(sparse.hstack([X, ones], format="csr"), np.zeros(X.shape[1]), True)
        means = np.average(X, axis=0, weights=sample_weight)
        return cls(np.hstack([X - means, ones]), means, True)

    def coefficients(self, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coefficients of the features, of shape (d, ...), and the intercept."""
        if not self.fit_intercept:
            return params, np.zeros(params.shape[1:])
        return params[:-1], params[-1] - self.means @ params[:-1]


class TunedLinearModel(BaseEstimator):
    """The base class of linear models that tune an L2 penalty per group of features by cross-validation.

    A subclass has a problem with a data fit that is a mean over examples, and calls `_tune`.
    """

    coef_: np.ndarray
    intercept_: Any
    alphas_: np.ndarray
    history_: list[Evaluation]
    n_iter_: int
    _problem: ClassVar[Callable[[Sequence[int]], Problem]]
    _curvature: ClassVar[Callable[[np.ndarray], np.ndarray] | None]

    def __init__(
        self,
        *,
        penalty: Any = "feature",
        cv: Any = 5,
        fit_intercept: bool = True,
        bounds: tuple[float, float] = (1e-3, 1e6),
        max_iter: int = 100,
        tol: float = 1e-3,
        verbose: bool = False,
    ) -> None:
        self.penalty = penalty
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.bounds = bounds
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        """Return the tags: the estimators accept sparse features."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _tune(self, X: Any, y: np.ndarray, sample_weight: Any, outputs: tuple[int, ...] = ()) -> np.ndarray:
        """Search the penalties, fit all rows with them, and return the coefficients, of shape (d, *outputs).

        Set ``intercept_``, ``alphas_``, ``history_`` and ``n_iter_``.
        """
        groups = _groups(self.penalty, X.shape[1])
        low, high = self._log_bounds()
        weights = np.asarray(_check_sample_weight(sample_weight, X, dtype=np.float64))
        splitter: Any = check_cv(self.cv, y, classifier=is_classifier(self))
        folds = [tuple(map(np.asarray, fold)) for fold in splitter.split(X, y)]
        _check_weights(weights, folds)
        design = Design.of(X, weights, self.fit_intercept)
        data = design.X, y, weights
        size = float(np.mean([weights[train].sum() for train, _ in folds]))
        params: Any = [np.zeros((design.X.shape[1], *outputs))] * len(folds)
        log_alphas = np.clip(np.log([START]), low, high)
        self.history_, self.n_iter_ = [], 0
        for part in [np.zeros_like(groups)] + [groups] * bool(groups.max()):  # one penalty first, for a good start
            start = np.broadcast_to(log_alphas, part.max() + 1) - np.log(size)
            found = self._search(part, folds, data, start, params, (low - np.log(size), high - np.log(size)))
            params, log_alphas = found.params, found.x + np.log(size)
            self.history_ += found.history
            self.n_iter_ += max(int(found.nit), 1)
            if not found.success:
                message = f"The search for penalties did not converge: {found.message} Raise max_iter or tol."
                warnings.warn(ConvergenceWarning(message), stacklevel=3)
        self.alphas_ = np.exp(log_alphas)[groups]
        params = self._fit_on(groups, *data)(log_alphas - np.log(weights.sum()), np.mean(params, axis=0))
        coef, self.intercept_ = design.coefficients(params)
        return coef

    def _search(
        self, groups: np.ndarray, folds: Sequence[Any], data: Args, start: np.ndarray, params: Any, bounds: Any
    ) -> Any:
        """Minimize the cross-validated loss over log penalties, from a start. Return the result of `minimize`."""
        cv = k_fold(self._on(groups), folds)
        fits = [self._fit_on(groups, *rows) for rows in cv.folds.training(data)]
        return minimize(
            cv,
            start,
            fit=lambda h, ws: [fit(h, w) for fit, w in zip(fits, ws, strict=True)],
            params0=params,
            inner_args=data,
            outer_args=data,
            solver=CG(rtol=1e-6, maxiter=1000, preconditioner=_block_preconditioner(fits)),
            bounds=bounds,
            maxiter=self.max_iter,
            options={"gtol": self.tol, "ftol": self.tol**2},
            progress=bool(self.verbose),
        )

    def _on(self, groups: np.ndarray) -> Problem:
        """Return the problem with a penalty per group. The intercept has none."""
        return type(self)._problem([*groups, -1] if self.fit_intercept else list(groups))

    def _fit_on(self, groups: np.ndarray, X: Any, y: Any, sample_weight: Any) -> NewtonFit:
        return NewtonFit(self._on(groups).inner, type(self)._curvature, X, y, sample_weight)

    def _log_bounds(self) -> tuple[float, float]:
        try:
            low, high = (float(limit) for limit in self.bounds)
        except (TypeError, ValueError) as error:
            raise ValueError(f"bounds: expected two numbers (low, high), got {self.bounds!r}.") from error
        if not 0 < low <= high < np.inf:
            raise ValueError(f"bounds: expected 0 < low <= high < inf, the range of alphas_, got {self.bounds!r}.")
        return float(np.log(low)), float(np.log(high))


def _block_preconditioner(fits: Sequence[NewtonFit]) -> Any:
    """Return the preconditioner of all folds: the solves of their last Newton steps."""

    def precondition(v: list[np.ndarray]) -> list[np.ndarray]:
        return [fit.precondition(part) for fit, part in zip(fits, v, strict=True)]

    return precondition


def _groups(penalty: Any, features: int) -> np.ndarray:
    """Return the number of the group of each feature."""
    if isinstance(penalty, str) and penalty in ("feature", "shared"):
        return np.arange(features) if penalty == "feature" else np.zeros(features, int)
    if isinstance(penalty, str) or np.shape(penalty) != (features,):
        got = repr(penalty) if isinstance(penalty, str) else f"an array of shape {np.shape(penalty)}"
        raise ValueError(
            f'penalty: expected "feature", "shared" or an array with the group of each of {features} features, got '
            f"{got}."
        )
    return np.unique(penalty, return_inverse=True)[1]


def _check_weights(weights: np.ndarray, folds: Sequence[Any]) -> None:
    if weights.min() < 0:
        raise ValueError(f"sample_weight: weights must not be negative, got {weights.min():.3g}.")
    for k, fold in enumerate(folds):
        for name, rows in zip(("training", "held-out"), fold, strict=True):
            if not weights[rows].sum() > 0:
                raise ValueError(f"sample_weight: all {name} rows of fold {k} have the weight 0. Use fewer folds.")
