"""Logistic regression that tunes its penalties."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from bilevel.problems.linear import logistic_regression
from bilevel.problems.sparse_linear import sparse_logistic
from bilevel.sklearn.classifier import TunedClassifier
from bilevel.sklearn.sparse_penalties import TunedSparseModel


class TunedLogisticRegression(TunedClassifier):
    """Logistic regression with an L2 penalty per feature or group, tuned by cross-validation.

    It minimizes Σᵢ log lossᵢ + ½ Σⱼ αⱼ ‖wⱼ‖². With one α for all features, this is
    `sklearn.linear_model.LogisticRegression` with C = 1/α. With more than two classes, the loss is the multinomial
    loss, and α of a feature is for its coefficients of all classes. The search is as in `TunedRidge`, with the mean log
    loss of the held-out rows.

    Args:
        penalty, cv, fit_intercept, bounds, max_iter, tol, verbose: as in `TunedRidge`. A number of folds means
            stratified folds.

    Attributes:
        classes_: the labels of the classes.
        coef_: w, of shape (1, n_features) for two classes, else (n_classes, n_features).
        intercept_: shape (1,) or (n_classes,).
        alphas_: α of each feature, of shape (n_features,), in the units of 1/C.
        history_, n_iter_, n_features_in_, feature_names_in_: as in `TunedRidge`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((100, 10))
    >>> y = np.where(2 * X[:, 0] + rng.logistic(size=100) > 0, "yes", "no")
    >>> model = TunedLogisticRegression().fit(X, y)
    >>> bool(model.alphas_[0] < np.median(model.alphas_[1:]))
    True
    """

    _problem = staticmethod(logistic_regression)

    def _tune_classes(self, X: Any, numbers: np.ndarray, sample_weight: Any, count: int) -> np.ndarray:
        coef = self._tune(X, numbers, sample_weight, () if count == 2 else (count,))
        if count > 2:  # a common shift of all intercepts has no effect
            self.intercept_ = self.intercept_ - self.intercept_.mean()
        return coef

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes, of shape (n, n_classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([special.expit(-scores), special.expit(scores)], axis=1)
        return special.softmax(scores, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of the probabilities of the classes, of shape (n, n_classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([special.log_expit(-scores), special.log_expit(scores)], axis=1)
        return special.log_softmax(scores, axis=1)


class TunedSparseLogisticRegression(TunedLogisticRegression, TunedSparseModel):
    """Logistic regression with a shared L1 penalty, or a penalty per feature or group, tuned by cross-validation.

    It minimizes Σᵢ log lossᵢ + Σⱼ αⱼ ‖wⱼ‖₁. With one α for all features, this is
    `sklearn.linear_model.LogisticRegression` with ``l1_ratio=1`` and C = 1/α. Classes and losses are as in
    `TunedLogisticRegression`, the search is as in `TunedLasso`.

    Args:
        penalty, cv, fit_intercept, bounds, max_iter, tol, verbose: as in `TunedLasso`. A number of folds means
            stratified folds.

    Attributes:
        classes_, coef_, intercept_: as in `TunedLogisticRegression`.
        alphas_: α of each feature, of shape (n_features,), in the units of 1/C.
        path_alphas_, path_errors_: the shared α of the path, and the mean log losses of the held-out rows there.
        history_, n_iter_, n_features_in_, feature_names_in_: as in `TunedLasso`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((100, 50))
    >>> y = np.where(3 * X[:, 0] + rng.logistic(size=100) > 0, "yes", "no")
    >>> model = TunedSparseLogisticRegression().fit(X, y)
    >>> int(abs(model.coef_).argmax())
    0
    """

    _problem = staticmethod(sparse_logistic)

    def _units(self, total: float) -> float:
        return total
