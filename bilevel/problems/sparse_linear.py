"""Linear models with an L1 penalty or an elastic net per weight, per feature or per group, or with shared penalties."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.problems.linear import DataFit, Unpenalized
from bilevel.problems.losses import CrossEntropy, LeastSquares
from bilevel.problems.proximal import Proximal
from bilevel.prox import elastic_net as elastic_net_operator
from bilevel.prox import l1 as l1_operator
from bilevel.spaces.array import Array


@dataclass(frozen=True)
class _Smooth:
    """The smooth part of the inner objective, fit(w). The proximal operator has the penalties."""

    fit: DataFit

    def __call__(self, params: Array, hparams: object, X: Any, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit(params, X, y, sample_weight)

    def grad(self, params: Array, hparams: object, X: Any, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit.grad(params, X, y, sample_weight)

    def hvp(
        self, params: Array, hparams: object, vector: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Array:
        return self.fit.hvp(params, vector, X, y, sample_weight)

    def hvp_on(
        self, support: Any, params: Array, hparams: object, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Callable[[Any], Any]:
        """Return v -> H v for v that are zero outside of the support, a mask. The result is zero there too."""
        return self.fit.hvp_on(support, params, X, y, sample_weight)

    def cross_vjp(
        self, params: Array, hparams: object, vector: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> None:
        return None

    def cross_jvp(
        self, params: Array, hparams: object, vector: object, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Any:
        return np.zeros_like(params)


def lasso(groups: Any = None) -> Proximal:
    """Return the Lasso with its penalties as hyperparameters.

    w* minimizes ½ mean (Xw − y)² + Σ exp(λ) |w| on ``inner_args=(X, y)``, and F = ½ mean (Xw − y)² on
    ``outer_args=(X_val, y_val)``. Shapes, ``sample_weight`` and ``hparams`` are as in `bl.problems.ridge`: log
    penalties, shared, per feature, per weight or per group. Scikit-learn's ``Lasso(alpha, fit_intercept=False)`` has
    the same minimum for alpha = exp(λ). For NumPy, the linear system takes time only for the features with a weight.

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.

    >>> import numpy as np, bilevel as bl
    >>> X, y = np.eye(2), np.array([3.0, 0.5])
    >>> fit = bl.newton_fit(bl.problems.lasso(), inner_args=(X, y))
    >>> fit(np.log(0.5) + np.zeros(()), None)
    array([2., 0.])
    """
    return Proximal(_Smooth(fit := DataFit(LeastSquares())), l1_operator(groups=groups), Unpenalized(fit))


def elastic_net(groups: Any = None) -> Proximal:
    """Return the elastic net with its penalties as hyperparameters.

    w* minimizes ½ mean (Xw − y)² + Σ exp(λ₁) |w| + ½ Σ exp(λ₂) w² (Zou & Hastie 2005), else as in `lasso`. ``hparams``
    is a dict ``{"l1": λ₁, "l2": λ₂}``. Scikit-learn's ``ElasticNet`` has the same minimum for exp(λ₁) = alpha l1_ratio
    and exp(λ₂) = alpha (1 − l1_ratio).

    Args:
        groups: as in `lasso`, for both penalties.
    """
    return Proximal(_Smooth(fit := DataFit(LeastSquares())), elastic_net_operator(groups=groups), Unpenalized(fit))


def sparse_logistic(groups: Any = None) -> Proximal:
    """Return logistic regression with an L1 penalty, and its penalties as hyperparameters.

    w* minimizes the mean cross-entropy + Σ exp(λ) |w|. Classes and shapes are as in `bl.problems.logistic_regression`,
    penalties as in `lasso`. Scikit-learn's ``LogisticRegression(C=C, l1_ratio=1)`` has the same minimum for
    C = 1/(n exp(λ)).

    Args:
        groups: as in `lasso`.
    """
    return Proximal(_Smooth(fit := DataFit(CrossEntropy())), l1_operator(groups=groups), Unpenalized(fit))
