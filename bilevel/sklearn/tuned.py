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

from bilevel.errors import InnerProblemWarning
from bilevel.linear_solvers.cg import CG
from bilevel.messages import callers_level
from bilevel.options import check_int, check_real
from bilevel.problems.folds import Folds, SplitRows
from bilevel.problems.protocols import BilevelProblem
from bilevel.search.evaluations import Evaluation
from bilevel.search.minimize import minimize
from bilevel.search.newton_fit import newton_fit
from bilevel.sklearn.shrinkage import SPREAD, ShrunkKFold
from bilevel.spaces.array import Args

START = 1.0  # the first alpha of a search
LOOSEST = 1e-7  # the tolerance of `newton_fit` in a search with a large tolerance
FIT_TOL = 1e-10  # of the last fit


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


class Start(NamedTuple):
    """Where a search starts.

    Attributes:
        logs: log penalties of shape (kinds, 1), shared by all features. A kind is L1 or L2.
        params: the minima of the folds there, or starts of their fits.
        bounds: the smallest and largest log penalty of each kind, of shape (kinds, 2).
    """

    logs: np.ndarray
    params: list[np.ndarray]
    bounds: np.ndarray


class TunedLinearModel(BaseEstimator):
    """The base class of linear models that tune penalties per group of features by cross-validation.

    A subclass has a problem with a data fit that is a mean over examples, and calls `_tune`.
    """

    coef_: np.ndarray
    intercept_: Any
    alphas_: np.ndarray
    history_: list[Evaluation]
    n_iter_: int
    _problem: ClassVar[Callable[[Sequence[int]], BilevelProblem]]
    _kinds: ClassVar[tuple[str, ...]] = ("l2",)

    def __init__(
        self,
        *,
        penalty: Any = "feature",
        cv: Any = 5,
        fit_intercept: bool = True,
        bounds: tuple[float, float] | None = (1e-3, 1e6),
        max_iter: int = 100,
        tol: float = 1e-3,
        verbose: bool = False,
    ) -> None:
        self.penalty = penalty
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.bounds: Any = bounds
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        """Return the tags: the estimators accept sparse features."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _tune(
        self, X: Any, y: np.ndarray, sample_weight: Any, outputs: tuple[int, ...] = (), labels: Any = None
    ) -> np.ndarray:
        """Search the penalties, fit all rows with them, and return the coefficients, of shape (d, *outputs).

        Set ``intercept_``, ``alphas_``, ``history_`` and ``n_iter_``. ``labels`` of the rows are for stratified folds.
        """
        groups = _groups(self.penalty, X.shape[1])
        self._check_options()
        weights = np.asarray(_check_sample_weight(sample_weight, X, dtype=np.float64))
        labels = y if labels is None else labels
        splitter: Any = check_cv(self.cv, labels, classifier=is_classifier(self))
        folds = [tuple(map(np.asarray, fold)) for fold in splitter.split(X, labels)]
        _check_weights(weights, folds)
        design = Design.of(X, weights, self.fit_intercept)
        data = design.X, y, weights
        rows = SplitRows(Folds(folds), data, _by_columns)
        size = float(np.mean([weights[train].sum() for train, _ in folds]))
        start = self._start(rows, np.zeros((design.X.shape[1], *outputs)), size)
        self.history_, self.n_iter_ = [], 0
        start = self._search(np.zeros_like(groups), rows, start)  # one penalty first, for a good start
        if groups.max():
            loss = self._unit_loss(min(evaluation.value for evaluation in self.history_))
            start = self._search(groups, rows, start, loss / (weights.sum() * SPREAD**2))
        logs = start.logs + np.log(self._units(size) / self._units(weights.sum()))
        self._set_alphas(np.exp(start.logs)[:, groups] * self._units(size))
        fit = newton_fit(self._on(groups), inner_args=_by_columns(data), tol=FIT_TOL)
        coef, self.intercept_ = design.coefficients(fit(self._hparams(logs), np.mean(start.params, axis=0)))
        return coef

    def _start(self, rows: SplitRows, params: np.ndarray, size: float) -> Start:
        """Return the start of the search for shared penalties. ``params`` are zeros."""
        bounds = self._log_bounds() - np.log(self._units(size))
        logs = np.clip(np.log(START / self._units(size)), *bounds)
        return Start(np.full((1, 1), logs), [params] * len(rows), bounds[None])

    def _unit_loss(self, loss: float) -> float:
        """Return the change of the loss of one example that counts as a unit of its log likelihood.

        Args:
            loss: the cross-validated loss with the best shared penalties.
        """
        return 1.0

    def _search(self, groups: np.ndarray, rows: SplitRows, start: Start, shrinkage: float = 0.0) -> Start:
        """Minimize the cross-validated loss over log penalties of groups. Return the minimum.

        ``shrinkage`` is the weight of the squared distance from the start.
        """
        logs = np.broadcast_to(start.logs, (len(self._kinds), groups.max() + 1))
        cv = ShrunkKFold(self._on(groups), rows, self._hparams(logs), shrinkage)
        fit: Any = newton_fit(cv, inner_args=(), tol=float(np.clip(self.tol**2, FIT_TOL, LOOSEST)))
        with warnings.catch_warnings():
            # A fit at a kink is no failure here, for example at the penalty where all weights become zero. An unsolved
            # fit ends the search without success.
            warnings.simplefilter("ignore", InnerProblemWarning)
            found = minimize(
                cv,
                self._hparams(logs),
                fit=fit,
                params0=start.params,
                solver=CG(rtol=1e-6, maxiter=1000, damping=self._damping(rows), preconditioner=fit.precondition),
                bounds=[tuple(pair) for pair in np.repeat(start.bounds, logs.shape[1], axis=0)],
                maxiter=self.max_iter,
                options=self._options(),
                progress=bool(self.verbose),
            )
        self.history_ += found.history
        self.n_iter_ += max(int(found.nit), 1)
        if not self._ended(found):
            message = f"The search for penalties did not converge: {found.message} Raise max_iter or tol."
            warnings.warn(ConvergenceWarning(message), stacklevel=callers_level())
        return Start(self._logs(found.x), found.params, start.bounds)

    def _damping(self, rows: SplitRows) -> float:
        """Return the damping of the linear solve."""
        return 0.0

    def _options(self) -> dict[str, float]:
        return {"gtol": self.tol, "ftol": self.tol**2}

    def _ended(self, found: Any) -> bool:
        """Return whether the search has converged."""
        return found.success

    def _set_alphas(self, alphas: np.ndarray) -> None:
        """Set the attributes for penalties of shape (kinds, d)."""
        [self.alphas_] = alphas

    def _units(self, total: float) -> float:
        """Return alpha/exp(λ), for rows with this total weight. scikit-learn's losses are sums."""
        return total

    def _hparams(self, logs: np.ndarray) -> Any:
        """Return the hyperparameters of the problem from log penalties of shape (kinds, groups)."""
        return logs[0] if len(logs) == 1 else dict(zip(self._kinds, logs, strict=True))

    def _logs(self, hparams: Any) -> np.ndarray:
        return np.stack([hparams[kind] for kind in self._kinds]) if isinstance(hparams, dict) else hparams[None]

    def _on(self, groups: np.ndarray) -> BilevelProblem:
        """Return the problem with a penalty per group. The intercept has none."""
        return type(self)._problem([*groups, -1] if self.fit_intercept else list(groups))

    def _check_options(self) -> None:
        check_int(self, "max_iter", least=1)
        check_real(self, "tol")
        if not isinstance(self.fit_intercept, bool | np.bool_):
            raise TypeError(f"fit_intercept: expected True or False, got {self.fit_intercept!r}.")

    def _log_bounds(self) -> np.ndarray:
        try:
            low, high = (float(limit) for limit in self.bounds)
        except (TypeError, ValueError) as error:
            raise ValueError(f"bounds: expected two numbers (low, high), got {self.bounds!r}.") from error
        if not 0 < low <= high < np.inf:
            raise ValueError(f"bounds: expected 0 < low <= high < inf, the range of alphas_, got {self.bounds!r}.")
        return np.log([low, high])


def _by_columns(data: Args) -> Args:
    """Return the data with features in the format that is fast for columns."""
    X: Any = data[0]
    return (X.tocsc() if sparse.issparse(X) else np.asfortranarray(X)), *data[1:]


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
    labels = np.asarray(penalty)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(f"penalty: feature {np.isnan(labels).argmax()} has the group nan.")
    return np.unique(labels, return_inverse=True)[1]


def _check_weights(weights: np.ndarray, folds: Sequence[Any]) -> None:
    if weights.min() < 0:
        raise ValueError(f"sample_weight: weights must not be negative, got {weights.min():.3g}.")
    for k, fold in enumerate(folds):
        for name, rows in zip(("training", "held-out"), fold, strict=True):
            if not weights[rows].sum() > 0:
                raise ValueError(f"sample_weight: all {name} rows of fold {k} have the weight 0. Use fewer folds.")
