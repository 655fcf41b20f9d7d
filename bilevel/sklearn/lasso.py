"""The Lasso, which tunes its penalties."""

from __future__ import annotations

from bilevel.problems.sparse_linear import lasso
from bilevel.sklearn.regressor import TunedRegressor
from bilevel.sklearn.sparse_penalties import TunedSparseModel


class TunedLasso(TunedRegressor, TunedSparseModel):
    """The Lasso with a shared L1 penalty, or a penalty per feature or group, tuned by cross-validation.

    It minimizes ½ mean (y − Xw − b)² + Σⱼ αⱼ |wⱼ|. With one α for all features, this is `sklearn.linear_model.Lasso`.
    The cross-validated error has several local minima. So the search computes the error at up to 12 values of a shared
    α, from the α for which all coefficients are zero. It stops when the error has risen. From the best value, it
    minimizes the error by `bl.minimize` and its gradient in log α. Then it tunes an α per group, which stays near the
    shared one as in `TunedRidge`.

    Args:
        penalty: "shared" (one α), "feature" (an α for each feature), or an array of shape (n_features,) with the group
            of each feature, which shares an α.
        cv: the number of folds, a splitter of scikit-learn, or an iterable of pairs of arrays of row numbers.
        fit_intercept: whether to fit an intercept, which has no penalty.
        bounds: the smallest and largest α. None: the largest is the α for which all coefficients are zero. The
            smallest is a thousandth of it, or a hundredth if there are more features than rows.
        max_iter: the maximum number of iterations of each search.
        tol: a search ends if the error decreases by less in an iteration, relative to the error, or if the gradient is
            smaller, relative to the first gradient.
        verbose: show a progress bar (tqdm, if installed).

    Attributes:
        coef_: w, of shape (n_features,).
        intercept_: b.
        alphas_: α of each feature, of shape (n_features,), in the units of `sklearn.linear_model.Lasso`.
        path_alphas_, path_errors_: the shared α of the path, and the cross-validated losses there (half the mean
            squared error).
        history_: an `bilevel.search.evaluations.Evaluation` for each hypergradient, first of the search for a shared α.
        n_iter_: the number of iterations of all searches.
        n_features_in_, feature_names_in_: as in scikit-learn.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 200))
    >>> y = 2 * X[:, 0] - X[:, 1] + rng.standard_normal(60)
    >>> model = TunedLasso().fit(X, y)
    >>> np.argsort(-abs(model.coef_))[:2]
    array([0, 1])
    """

    _problem = staticmethod(lasso)
