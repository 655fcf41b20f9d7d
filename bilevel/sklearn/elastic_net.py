"""The elastic net, which tunes its penalties."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bilevel.problems.folds import SplitRows
from bilevel.problems.sparse_linear import elastic_net
from bilevel.sklearn.regressor import TunedRegressor
from bilevel.sklearn.sparse_penalties import TunedSparseModel, mean_square

WIDEST = np.log([1e-4, 1e3])  # the bounds of L2 penalties, relative to the mean variance of a feature


class TunedElasticNet(TunedRegressor, TunedSparseModel):
    """The elastic net with shared penalties, or penalties per feature or group, tuned by cross-validation.

    It minimizes ½ mean (y − Xw − b)² + Σⱼ αⱼ (ρⱼ |wⱼ| + ½ (1 − ρⱼ) wⱼ²). With one α and one ρ for all features, this
    is `sklearn.linear_model.ElasticNet` with ``l1_ratio`` ρ. The search is as in `TunedLasso`. It tunes the L1 penalty
    αρ and the L2 penalty α(1 − ρ), which both decrease on the path.

    Args:
        penalty: "shared" (two penalties), "feature" (two for each feature), or an array of shape (n_features,) with the
            group of each feature, which shares the penalties.
        bounds: the smallest and largest L1 and L2 penalty. None: L1 penalties as in `TunedLasso`, and L2 penalties of
            1e-4 to 1e3 times the mean variance of a feature.
        cv, fit_intercept, max_iter, tol, verbose: as in `TunedLasso`.

    Attributes:
        alphas_, l1_ratios_: α and ρ of each feature, of shape (n_features,), in the units of
            `sklearn.linear_model.ElasticNet`.
        path_alphas_: α on the path.
        coef_, intercept_, path_errors_, history_, n_iter_, n_features_in_, feature_names_in_: as in `TunedLasso`.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 200))
    >>> y = 2 * X[:, 0] - X[:, 1] + rng.standard_normal(60)
    >>> model = TunedElasticNet().fit(X, y)
    >>> np.argsort(-abs(model.coef_))[:2]
    array([0, 1])
    """

    l1_ratios_: np.ndarray
    _problem = staticmethod(elastic_net)
    _kinds: ClassVar[tuple[str, ...]] = ("l1", "l2")

    def _limits(self, largest: float, rows: SplitRows) -> np.ndarray:
        return np.vstack([super()._limits(largest, rows), np.log(mean_square(rows, self.fit_intercept)) + WIDEST])

    def _path(self, limits: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.vstack([limits[0, 1] + steps, limits[1, 1] - WIDEST[1] + steps])

    def _set_alphas(self, alphas: np.ndarray) -> None:
        self.alphas_ = alphas.sum(0)
        self.l1_ratios_ = alphas[0] / self.alphas_
