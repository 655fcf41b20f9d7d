"""Estimators with tuned penalties: scikit-learn's conventions, its solutions, and the cross-validated loss."""

import warnings

import numpy as np
import pytest
from frameworks import relative_error
from scipy import sparse

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.search import quadratic_model
from bilevel.sklearn import TunedLogisticRegression, TunedRidge


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([make(cv=2, max_iter=3, tol=1e-2) for make in (TunedRidge, TunedLogisticRegression)])
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)


def regression(n=80, d=8, seed=0):
    X, y = make_regression(n, d, n_informative=3, noise=20.0, random_state=seed)
    return X + 3.0, y / 20 + 7.0  # not centered, to test the intercept


def classification(classes, n=150, d=6):
    shape = {"n_informative": 3, "n_redundant": 0, "n_classes": classes, "n_clusters_per_class": 1}
    X, y = make_classification(n, d, **shape, flip_y=0.2, random_state=1)
    return X + 1.0, np.array(["a", "b", "c"])[y]


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_scikit_learns_ridge_with_the_penalties_found(fit_intercept, weighted):
    X, y = regression()
    weights = np.random.default_rng(0).uniform(0, 2, len(y)) if weighted else None
    model = TunedRidge(fit_intercept=fit_intercept).fit(X, y, sample_weight=weights)
    roots = np.sqrt(model.alphas_)
    expected = Ridge(1.0, fit_intercept=fit_intercept).fit(X / roots, y, sample_weight=weights)
    assert relative_error(model.coef_, expected.coef_ / roots) <= 1e-8
    assert model.intercept_ == pytest.approx(expected.intercept_, abs=1e-8)
    assert relative_error(model.predict(X), expected.predict(X / roots)) <= 1e-8


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_scikit_learns_with_the_penalties_found(classes):
    X, y = classification(classes)
    weights = np.random.default_rng(0).uniform(0, 2, len(y))
    model = TunedLogisticRegression().fit(X, y, sample_weight=weights)
    roots = np.sqrt(model.alphas_)
    expected = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-10, max_iter=1000).fit(X / roots, y, weights)
    assert relative_error(model.coef_, expected.coef_ / roots) <= 1e-5
    assert relative_error(model.predict_proba(X), expected.predict_proba(X / roots)) <= 1e-6
    assert np.array_equal(model.predict(X), expected.predict(X / roots))
    assert np.allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))


def cv_error(X, y, alphas, folds):
    """The mean over the folds of half the mean squared error, by scikit-learn. Penalties are per training row."""
    errors, size = [], np.mean([len(train) for train, _ in folds])
    for train, test in folds:
        roots = np.sqrt(alphas * len(train) / size)
        model = Ridge(1.0).fit(X[train] / roots, y[train])
        errors.append(0.5 * np.mean((y[test] - model.predict(X[test] / roots)) ** 2))
    return np.mean(errors)


def test_the_penalties_minimize_the_cross_validated_error():
    X, y = regression()
    folds = list(KFold(3).split(X))
    model = TunedRidge(cv=folds, tol=1e-5, bounds=(1e-3, 1e4)).fit(X, y)
    best = cv_error(X, y, model.alphas_, folds)
    assert model.history_[-1].value == pytest.approx(best, rel=1e-6)
    assert best < min(cv_error(X, y, np.full(X.shape[1], alpha), folds) for alpha in np.logspace(-3, 4, 30))
    for j in range(X.shape[1]):
        for factor in (0.7, 1.4):
            moved = model.alphas_.copy()
            moved[j] = np.clip(moved[j] * factor, 1e-3, 1e4)
            assert cv_error(X, y, moved, folds) >= best * (1 - 1e-9)


def test_a_shared_penalty_is_the_best_of_a_grid():
    X, y = regression()
    folds = list(KFold(3).split(X))
    model = TunedRidge(penalty="shared", cv=folds, tol=1e-6).fit(X, y)
    grid = [cv_error(X, y, np.full(X.shape[1], alpha), folds) for alpha in np.logspace(-3, 4, 200)]
    assert len(set(model.alphas_)) == 1
    assert model.history_[-1].value <= min(grid)


def test_groups_share_penalties():
    X, y = regression()
    groups = ["a", "a", "b", "b", "c", "c", "c", "a"]
    alphas = TunedRidge(penalty=groups).fit(X, y).alphas_
    assert len(set(alphas)) == 3
    assert alphas[0] == alphas[1] == alphas[7]
    assert alphas[4] == alphas[5] == alphas[6]


@pytest.mark.parametrize("classes", [2, 3])
def test_sparse_features_give_the_fit_of_dense_features(classes):
    X, y = classification(classes)
    X[X < 0.5] = 0
    options = {"cv": StratifiedKFold(3), "tol": 1e-6}
    dense = TunedLogisticRegression(**options).fit(X, y)
    found = TunedLogisticRegression(**options).fit(sparse.csr_array(X), y)
    assert relative_error(found.predict_proba(sparse.csr_array(X)), dense.predict_proba(X)) <= 1e-4


@pytest.mark.parametrize("classes", [2, 3])
def test_fits_by_cg_agree_with_fits_by_cholesky(classes, monkeypatch):
    X, y = classification(classes)
    dense = TunedLogisticRegression(cv=3).fit(X, y)
    monkeypatch.setattr(quadratic_model, "LARGEST_MATRIX", 0)
    found = TunedLogisticRegression(cv=3).fit(X, y)
    assert relative_error(found.predict_proba(X), dense.predict_proba(X)) <= 1e-3
    ridge = TunedRidge(cv=3).fit(*regression())
    roots = np.sqrt(ridge.alphas_)
    X, y = regression()
    assert relative_error(ridge.coef_, Ridge(1.0).fit(X / roots, y).coef_ / roots) <= 1e-6


def test_it_works_in_a_pipeline_and_in_parallel():
    X, y = regression()
    pipeline = make_pipeline(StandardScaler().set_output(transform="default"), TunedRidge(cv=3, tol=1e-2))
    scores = cross_val_score(clone(pipeline), X, y, n_jobs=2)
    assert scores.min() > 0.3
    assert pipeline.fit(X, y).score(X, y) > 0.5


def test_a_search_that_ends_early_warns():
    X, y = regression()
    with pytest.warns(ConvergenceWarning, match=r"The search for penalties did not converge: .* Raise max_iter or tol"):
        TunedRidge(cv=3, max_iter=1, tol=1e-9).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TunedRidge(cv=3).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "l1"}, 'penalty: expected "feature", "shared" or an array .* got \'l1\''),
        ({"penalty": [0, 1]}, r"the group of each of 8 features, got an array of shape \(2,\)"),
        ({"bounds": 3}, r"bounds: expected two numbers \(low, high\), got 3"),
        ({"bounds": (0, 1)}, r"bounds: expected 0 < low <= high < inf"),
        ({"max_iter": 0}, "maxiter: expected an integer >= 1"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TunedRidge(**options).fit(*regression())


def test_weights_and_classes_that_leave_nothing_to_fit_are_named():
    X, y = regression()
    weights = np.ones(len(y))
    weights[:16] = 0
    with pytest.raises(ValueError, match="sample_weight: all held-out rows of fold 0 have the weight 0"):
        TunedRidge(cv=5).fit(X, y, sample_weight=weights)
    with pytest.raises(ValueError, match="sample_weight: weights must not be negative, got -1"):
        TunedRidge().fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match="expected at least two classes, got one class"):
        TunedLogisticRegression().fit(X, np.ones(len(y)))
