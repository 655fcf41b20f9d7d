"""A linear support vector machine that tunes its penalties."""

from __future__ import annotations

from typing import Any

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
        penalty, cv, fit_intercept, bounds, max_iter, tol, verbose: as in `TunedLogisticRegression`.

    Attributes:
        classes_, coef_, intercept_, alphas_, history_, n_iter_, n_features_in_, feature_names_in_: as in
            `TunedLogisticRegression`.

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

    def _tune_classes(self, X: Any, numbers: np.ndarray, sample_weight: Any, count: int) -> np.ndarray:
        if count == 2:
            return self._tune(X, numbers, sample_weight)
        return self._tune(X, np.eye(count)[numbers], sample_weight, (count,), labels=numbers)
