"""The fit and the predictions that regressors share."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from bilevel.sklearn.tuned import TunedLinearModel


class TunedRegressor(RegressorMixin, TunedLinearModel):
    """The base class of regressors with one target."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Tune the penalties, and fit.

        Args:
            X: shape (n, n_features), dense or sparse.
            y: shape (n,).
            sample_weight: shape (n,), weights of the errors in the fits and in the cross-validation.

        Raises:
            ValueError: for invalid input or options.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True)
        y = np.asarray(y, np.float64)
        # The tolerance of a fit is relative to the gradient at w = 0, which a large mean of y would dominate.
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
        mean = np.average(y, weights=weights) if self.fit_intercept and weights.sum() > 0 else 0.0
        self.coef_ = self._tune(X, y - mean, sample_weight)
        self.intercept_ = float(self.intercept_ + mean)
        return self

    def _unit_loss(self, loss: float) -> float:
        return 2 * loss  # half the squared error, in units of the variance of the errors

    def predict(self, X: Any) -> np.ndarray:
        """Return the predictions, of shape (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        return X @ self.coef_ + self.intercept_
