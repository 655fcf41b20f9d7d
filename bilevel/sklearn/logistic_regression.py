"""Logistic regression that tunes its penalties."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy import special
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from bilevel.problems.linear import logistic_regression
from bilevel.sklearn.tuned import TunedLinearModel


class TunedLogisticRegression(ClassifierMixin, TunedLinearModel):
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

    classes_: np.ndarray
    _problem = staticmethod(logistic_regression)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Tune the penalties, and fit.

        Args:
            X: shape (n, n_features), dense or sparse.
            y: labels of shape (n,).
            sample_weight: shape (n,), weights of the losses in the fits and in the cross-validation.

        Raises:
            ValueError: for invalid input or options, or labels of one class.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]!r}.")
        coef = self._tune(X, numbers, sample_weight, () if count == 2 else (count,))
        if count > 2:  # a common shift of all intercepts has no effect
            self.intercept_ = self.intercept_ - self.intercept_.mean()
        self.coef_, self.intercept_ = np.atleast_2d(coef.T), np.atleast_1d(self.intercept_)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the scores, of shape (n,) for two classes, else (n, n_classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

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

    def predict(self, X: Any) -> np.ndarray:
        """Return the labels of the most probable classes, of shape (n,)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
