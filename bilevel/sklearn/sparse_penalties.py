"""The search for L1 penalties: a path of shared penalties, then `bl.minimize` from the best of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

from bilevel.problems.folds import SplitRows
from bilevel.problems.k_fold import KFoldProblem
from bilevel.search.newton_fit import newton_fit
from bilevel.sklearn.tuned import Start, TunedLinearModel

LENGTH = 12  # of a path
SHARE = 1e-3  # the smallest penalty of a path, relative to the largest
WIDE_SHARE = 1e-2  # the same for more features than rows, where smaller penalties interpolate the targets
RISE = 1.02  # of the error above the best: after two such values, a path ends
PATH_TOL = 1e-4  # of the fits on a path
SINGULAR = 1e-9  # of the mean square of a feature: the damping of the linear solve, for as many weights as rows
EMPTY = 1e50  # an L1 penalty for which all weights are zero


class TunedSparseModel(TunedLinearModel):
    """The base class of linear models with L1 penalties.

    The cross-validated error of L1 penalties has kinks and several local minima. So the search starts with a path.
    """

    path_alphas_: np.ndarray
    path_errors_: np.ndarray
    _kinds: ClassVar[tuple[str, ...]] = ("l1",)

    def __init__(
        self,
        *,
        penalty: Any = "shared",
        cv: Any = 5,
        fit_intercept: bool = True,
        bounds: tuple[float, float] | None = None,
        max_iter: int = 50,
        tol: float = 1e-3,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            penalty=penalty,
            cv=cv,
            fit_intercept=fit_intercept,
            bounds=bounds,
            max_iter=max_iter,
            tol=tol,
            verbose=verbose,
        )

    def _start(self, rows: SplitRows, params: np.ndarray, size: float) -> Start:
        groups = np.zeros(params.shape[0] - self.fit_intercept, int)
        problem: Any = self._on(groups)
        cv = KFoldProblem(problem, rows)
        fit = newton_fit(cv, inner_args=(), tol=PATH_TOL)
        empty = fit(self._hparams(np.log(np.full((len(self._kinds), 1), EMPTY))), [params] * len(rows))
        gradients = [problem.smooth.grad(w, None, *part) for w, part in zip(empty, rows.training(), strict=True)]
        largest = max(float(np.abs(gradient[: len(groups)]).max(initial=0.0)) for gradient in gradients)
        limits = self._limits(largest or 1.0, rows)  # for constant targets, any penalty has the same fit
        bounds = limits if self.bounds is None else self._log_bounds() - np.log(self._units(size))
        bounds = np.broadcast_to(bounds, limits.shape)
        path = self._path(limits, np.linspace(0, limits[0, 0] - limits[0, 1], LENGTH))
        path = np.clip(path, bounds[:, :1], bounds[:, 1:])
        path = path[:, np.append(True, np.diff(path[0]) < 0)]
        at, params_at, errors = best_of_path(cv, lambda k: self._hparams(path[:, k : k + 1]), fit, empty, path.shape[1])
        self.path_alphas_ = self._units(size) * np.exp(path[:, : len(errors)]).sum(0)
        self.path_errors_ = errors
        return Start(path[:, at : at + 1], params_at, np.array(bounds))

    def _limits(self, largest: float, rows: SplitRows) -> np.ndarray:
        """Return the default bounds of log penalties, of shape (kinds, 2). All weights are zero at ``largest``."""
        X, _, weights = _arrays(rows)[0]
        n, d = np.count_nonzero(weights), X.shape[1]
        return np.log(largest) + np.array([[np.log(WIDE_SHARE if d > n else SHARE), 0.0]])

    def _path(self, limits: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the log penalties of a path, of shape (kinds, steps), that starts at the largest L1 penalty."""
        return limits[:, 1:] + steps

    def _units(self, total: float) -> float:
        return 1.0  # scikit-learn's losses of sparse regressors are means

    def _damping(self, rows: SplitRows) -> float:
        return SINGULAR * mean_square(rows, self.fit_intercept)

    def _options(self) -> dict[str, float]:
        return {"gtol": self.tol, "ftol": self.tol}

    def _ended(self, found: Any) -> bool:
        return found.success or found.status == 2  # no smaller value on a line: the minimum is at a kink


def mean_square(rows: SplitRows, centered: bool) -> float:
    """Return the weighted mean of the squares of the features, less their means, over all folds, > 0."""
    total = count = 0.0
    for X, _, weights in _arrays(rows):
        squares: Any = X.multiply(X) if sparse.issparse(X) else X**2
        total, count = total + float((weights @ squares).sum()), count + weights.sum() * X.shape[1]
        total -= centered * float(((weights @ X) ** 2).sum() / weights.sum())
    return total / count if total > 0 else 1.0


def _arrays(rows: SplitRows) -> list[Any]:
    return list(rows.training())


def best_of_path(
    cv: KFoldProblem, hparams: Callable[[int], Any], fit: Callable[..., Any], params: Any, length: int
) -> tuple[int, Any, np.ndarray]:
    """Return the number of the best hyperparameters of a path, the params there, and the errors.

    The path ends after the error has risen.

    Args:
        cv: the cross-validation.
        hparams: k -> hyperparameters.
        fit: as in `bl.minimize`.
        params: the first start. Each fit starts from the params before.
        length: the number of hyperparameters.
    """
    errors, best = np.empty(0), (0, params)
    for k in range(length):
        params = fit(hparams(k), params)
        errors = np.append(errors, float(cv.outer(params, hparams(k))))
        if errors[k] <= errors.min():
            best = (k, params)
        if k > best[0] + 1 and errors[-2:].min() > RISE * errors.min():
            break
    return *best, errors
