"""A linear support vector machine that tunes its penalties."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from bilevel.problems.linear import svm
from bilevel.sklearn.classifier import TunedClassifier


class TunedLinearSVC(TunedClassifier):
    """A linear support vector machine with an L2 penalty per feature or group, tuned by cross-validation.

    It minimizes Σᵢ max(0, 1 − tᵢ(xᵢᵀw + b))² + ½ Σⱼ αⱼ wⱼ², with tᵢ = ±1. With one α for all features, this is
    `sklearn.svm.LinearSVC` with C = 1/α, apart from the intercept, which has no penalty here. More than two classes
    have one such machine each, against all other classes, and α of a feature is for all of them. The search is as in
    `TunedLogisticRegression`, with the mean loss of the held-out rows, summed over the machines.

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
    >>> model = TunedLinearSVC().fit(X, y)
    >>> bool(model.alphas_[0] < np.median(model.alphas_[1:]))
    True
    """

    _problem = staticmethod(svm)

    def _units(self, total: float) -> float:
        return 2 * total  # the loss of the problem is half the squared hinge

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Tune the penalties, and fit.

        Args:
            X: shape (n, n_features), dense or sparse.
            y: labels of shape (n,).
            sample_weight: shape (n,), weights of the losses in the fits and in the cross-validation.

        Raises:
            ValueError: for invalid input or options, or labels of one class.
        """
        X, numbers = self._class_numbers(X, y)
        count = len(self.classes_)
        if count == 2:
            coef = self._tune(X, numbers, sample_weight)
        else:
            coef = self._tune(X, np.eye(count)[numbers], sample_weight, (count,), labels=numbers)
        self._set_coefficients(coef)
        return self
