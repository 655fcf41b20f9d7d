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
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.search import quadratic_model
from bilevel.sklearn import (
    TunedElasticNet,
    TunedLasso,
    TunedLinearSVC,
    TunedLogisticRegression,
    TunedRidge,
    TunedSparseLogisticRegression,
)

ESTIMATORS = (
    TunedElasticNet,
    TunedLasso,
    TunedLinearSVC,
    TunedLogisticRegression,
    TunedRidge,
    TunedSparseLogisticRegression,
)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([make(cv=2, max_iter=3, tol=1e-2) for make in ESTIMATORS])
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


def test_the_penalties_minimize_the_cross_validated_error_and_the_prior():
    X, y = regression()
    options = {"cv": list(KFold(3).split(X)), "tol": 1e-5}
    model, shared = TunedRidge(**options).fit(X, y), TunedRidge(penalty="shared", **options).fit(X, y)
    variance = 2 * cv_error(X, y, shared.alphas_, options["cv"])

    def objective(alphas):
        prior = 0.5 * np.sum((np.log(alphas / shared.alphas_) / 0.5) ** 2)
        return cv_error(X, y, alphas, options["cv"]) + variance / len(y) * prior

    best = objective(model.alphas_)
    assert model.history_[-1].value == pytest.approx(best, rel=1e-6)
    assert best < objective(shared.alphas_)
    for j in range(X.shape[1]):
        for factor in (0.9, 1.1):
            moved = model.alphas_.copy()
            moved[j] *= factor
            assert objective(moved) > best


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
        ({"penalty": [0, np.nan, *[1] * 6]}, "penalty: feature 1 has the group nan"),
        ({"max_iter": 0}, "TunedRidge.max_iter: expected an integer >= 1, got 0"),
        ({"max_iter": 2.5}, "TunedRidge.max_iter: expected an integer >= 1, got 2.5"),
        ({"tol": -1}, "TunedRidge.tol: expected a finite number >= 0, got -1"),
        ({"tol": "small"}, "TunedRidge.tol: expected a finite number >= 0, got 'small'"),
        ({"fit_intercept": "no"}, "fit_intercept: expected True or False, got 'no'"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
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


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("penalty", ["shared", "feature"])
def test_the_lasso_and_the_elastic_net_are_scikit_learns(fit_intercept, penalty):
    X, y = regression()
    weights = np.random.default_rng(0).uniform(0, 2, len(y))
    options = {"penalty": penalty, "fit_intercept": fit_intercept}
    precise = {"fit_intercept": fit_intercept, "tol": 1e-14, "max_iter": 100_000}
    model = TunedLasso(**options).fit(X, y, sample_weight=weights)
    expected = Lasso(1.0, **precise).fit(X / model.alphas_, y, sample_weight=weights)
    assert relative_error(model.coef_, expected.coef_ / model.alphas_) <= 1e-6
    assert model.intercept_ == pytest.approx(expected.intercept_, abs=1e-6)
    model = TunedElasticNet(**options).fit(X, y, sample_weight=weights)
    if penalty == "shared":
        net = ElasticNet(model.alphas_[0], l1_ratio=model.l1_ratios_[0], **precise).fit(X, y, sample_weight=weights)
        assert relative_error(model.coef_, net.coef_) <= 1e-6
    gradient = -X.T @ (weights * (y - model.predict(X))) / weights.sum()
    gradient += model.alphas_ * (1 - model.l1_ratios_) * model.coef_
    l1, zero = model.alphas_ * model.l1_ratios_, model.coef_ == 0
    assert np.abs(gradient + l1 * np.sign(model.coef_))[~zero].max() <= 1e-7
    assert np.all(np.abs(gradient)[zero] <= l1[zero])


@pytest.mark.parametrize("classes", [2, 3])
def test_sparse_logistic_regression_is_optimal(classes):
    X, y = classification(classes)
    model = TunedSparseLogisticRegression().fit(X, y)
    P = model.predict_proba(X)
    errors = (P - (y[:, None] == model.classes_))[:, 1 if classes == 2 else 0 :]
    gradient, zero = errors.T @ X, model.coef_ == 0
    alphas = np.broadcast_to(model.alphas_, gradient.shape)
    assert np.abs(errors.sum(0)).max() <= 1e-6
    assert np.abs(gradient + alphas * np.sign(model.coef_))[~zero].max() <= 1e-6
    assert np.all(np.abs(gradient)[zero] <= alphas[zero] + 1e-6)
    assert len(model.path_alphas_) == len(model.path_errors_)
    assert model.history_[-1].value <= model.path_errors_.min() * (1 + 1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_support_vector_machine_is_scikit_learns_with_the_penalties_found(classes):
    X, y = classification(classes)
    model = TunedLinearSVC(fit_intercept=False).fit(X, y)
    roots = np.sqrt(model.alphas_)
    expected = LinearSVC(C=1.0, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(X / roots, y)
    assert relative_error(model.coef_, expected.coef_ / roots) <= 1e-4
    assert np.array_equal(model.predict(X), expected.predict(X / roots))
    free = TunedLinearSVC().fit(X, y)
    scores = free.decision_function(X).reshape(len(y), -1)
    signs = np.where(y[:, None] == free.classes_[-scores.shape[1] :], 1, -1)
    violated = signs * np.maximum(0, 1 - signs * scores)
    assert np.abs(violated.sum(0)).max() <= 1e-6  # the intercept has no penalty
    assert np.abs(free.alphas_[:, None] * free.coef_.T - 2 * X.T @ violated).max() <= 1e-5


def lasso_error(X, y, alpha, folds):
    """The mean over the folds of half the mean squared error of scikit-learn's Lasso."""
    errors = []
    for train, test in folds:
        model = Lasso(alpha, tol=1e-10, max_iter=100_000).fit(X[train], y[train])
        errors.append(0.5 * np.mean((y[test] - model.predict(X[test])) ** 2))
    return np.mean(errors)


def test_a_shared_l1_penalty_is_the_best_of_a_grid():
    X, y = regression(d=20)
    folds = list(KFold(3).split(X))
    model = TunedLasso(cv=folds, tol=1e-6).fit(X, y)
    grid = [lasso_error(X, y, alpha, folds) for alpha in np.logspace(0, -3, 60) * model.path_alphas_[0]]
    assert model.history_[-1].value == pytest.approx(lasso_error(X, y, model.alphas_[0], folds), rel=1e-6)
    assert model.history_[-1].value <= min(grid) * (1 + 1e-4)
    assert model.path_errors_[:2] == pytest.approx(
        [lasso_error(X, y, a, folds) for a in model.path_alphas_[:2]], rel=1e-3
    )


def test_l1_penalties_per_feature_continue_from_the_shared_penalty():
    X, y = regression(d=20)
    shared = TunedLasso().fit(X, y)
    model = TunedLasso(penalty="feature").fit(X, y)
    assert len(set(model.alphas_)) > 1
    assert model.history_[-1].value < shared.history_[-1].value


@pytest.mark.parametrize("make", [TunedLasso, TunedElasticNet])
def test_sparse_features_give_the_sparse_model_of_dense_features(make):
    X, y = regression()
    X[np.abs(X - 3) < 0.5] = 0
    dense, found = make(tol=1e-6).fit(X, y), make(tol=1e-6).fit(sparse.csr_array(X), y)
    assert relative_error(found.coef_, dense.coef_) <= 1e-3


def test_bounds_of_l1_penalties():
    X, y = regression()
    model = TunedLasso(bounds=(0.5, 2.0)).fit(X, y)
    assert 0.5 - 1e-9 <= model.alphas_[0] <= 2 + 1e-9
    assert model.path_alphas_.max() <= 2 + 1e-9
    with pytest.raises(ValueError, match="expected 0 < low <= high < inf"):
        TunedLasso(bounds=(0, 1)).fit(X, y)


def test_targets_without_signal_give_a_fit_without_a_warning():
    """All coefficients are zero at the end of the search, which is a kink of the Lasso."""
    X = np.random.default_rng(0).standard_normal((40, 10))
    model = TunedLasso(cv=3).fit(X, np.random.default_rng(1).standard_normal(40))
    assert not model.coef_.any()
    for estimator in (TunedLasso(cv=3), TunedElasticNet(cv=3)):
        constant = estimator.fit(X, np.full(40, 2.0))
        assert constant.intercept_ == pytest.approx(2.0)
        assert 1e-6 < constant.alphas_[0] < 1e6
