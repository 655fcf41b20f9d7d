"""The labels and the decision function that classifiers share."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from bilevel.sklearn.tuned import Start, TunedLinearModel, risen


class TunedClassifier(ClassifierMixin, TunedLinearModel):
    """The base class of linear classifiers for two or more classes."""

    classes_: np.ndarray

    def _restart(self, found: Start) -> Start:
        return risen(found)

    def _class_numbers(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Return the checked features and the number of the class of each row. Set ``classes_``."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]!r}.")
        return X, numbers

    def _set_coefficients(self, coef: np.ndarray) -> None:
        self.coef_, self.intercept_ = np.atleast_2d(coef.T), np.atleast_1d(self.intercept_)

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
