"""The labels and the decision function that classifiers share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from bilevel.sklearn.tuned import TunedLinearModel


class TunedClassifier(ClassifierMixin, TunedLinearModel):
    """The base class of linear classifiers for two or more classes."""

    classes_: np.ndarray

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
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]!r}.")
        coef = self._tune_classes(X, numbers, sample_weight, len(self.classes_))
        self.coef_, self.intercept_ = np.atleast_2d(coef.T), np.atleast_1d(self.intercept_)
        return self

    @abstractmethod
    def _tune_classes(self, X: Any, numbers: np.ndarray, sample_weight: Any, count: int) -> np.ndarray:
        """Tune the penalties. Return the coefficients, of shape (d,) for two classes, else (d, count).

        Args:
            X: the features.
            numbers: the number of the class of each row.
            sample_weight: as in `fit`.
            count: the number of classes.
        """
        raise NotImplementedError

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the scores, of shape (n,) for two classes, else (n, n_classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """Return the labels of the classes with the largest scores, of shape (n,)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
