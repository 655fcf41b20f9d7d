"""Ridge regression that tunes its penalties."""

from __future__ import annotations

from bilevel.problems.linear import ridge
from bilevel.sklearn.regressor import TunedRegressor


class TunedRidge(TunedRegressor):
    """Ridge regression with an L2 penalty per feature or group, tuned by cross-validation.

    It minimizes ‖y − Xw − b‖² + Σⱼ αⱼ wⱼ². With one α for all features, this is `sklearn.linear_model.Ridge`. The
    search minimizes the mean over the folds of the mean squared error of the held-out rows, by `bl.minimize` and its
    gradient in all log αⱼ. It tunes a shared α first. An α per group stays near the shared one, unless the data say
    otherwise: the search adds a normal prior of log αⱼ with standard deviation ½. Without it, many penalties overfit
    the folds. Then it fits all rows with the α that it has found.

    A penalty depends on the scale of its feature. To start from a reasonable point, scale the features to a standard
    deviation of about 1.

    Args:
        penalty: "feature" (an α for each feature), "shared" (one α), or an array of shape (n_features,) with the group
            of each feature, which shares an α.
        cv: the number of folds, a splitter of scikit-learn, or an iterable of pairs of arrays of row numbers.
        fit_intercept: whether to fit an intercept, which has no penalty.
        bounds: the smallest and largest α.
        max_iter: the maximum number of iterations of each search.
        tol: a search ends if the gradient is smaller, relative to the first gradient.
        verbose: show a progress bar (tqdm, if installed).

    Attributes:
        coef_: w, of shape (n_features,).
        intercept_: b.
        alphas_: α of each feature, of shape (n_features,), in the units of `sklearn.linear_model.Ridge`.
        history_: an `bilevel.search.evaluations.Evaluation` for each hypergradient, first of the search for a shared α.
        n_iter_: the number of iterations of all searches.
        n_features_in_, feature_names_in_: as in scikit-learn.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((60, 10))
    >>> y = 2 * X[:, 0] + rng.standard_normal(60)  # one feature of ten matters
    >>> model = TunedRidge().fit(X, y)
    >>> bool(model.alphas_[0] < np.median(model.alphas_[1:]))
    True
    """

    _problem = staticmethod(ridge)
