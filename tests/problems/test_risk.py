"""SURE and generalized cross-validation against closed forms and differences of refits."""

import numpy as np
import pytest
from frameworks import moved, relative_error

import bilevel as bl

N, D, SIGMA = 20, 4, 0.7
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, D))
Y = X @ np.array([1.0, -1.0, 0.0, 0.0]) + SIGMA * RNG.standard_normal(N)
DELTA = np.random.default_rng(3).standard_normal(N)


def closed_form(criterion, h):
    """Return the criterion of ridge regression, whose predictions are S y."""
    S = X @ np.linalg.solve(X.T @ X / N + np.diag(np.exp(h)), X.T / N)
    error, share = np.mean((S @ Y - Y) ** 2), DELTA @ S @ DELTA / N
    return error - SIGMA**2 + 2 * SIGMA**2 * share if criterion == "sure" else error / (1 - share) ** 2


def make(criterion, problem):
    return bl.problems.sure(problem, SIGMA, seed=3) if criterion == "sure" else bl.problems.gcv(problem, seed=3)


def differences(value, h, step=1e-5):
    return np.array([(value(h + step * e) - value(h - step * e)) / (2 * step) for e in np.eye(len(h))])


@pytest.mark.parametrize("criterion", ["sure", "gcv"])
def test_ridge_has_a_closed_form(backend, criterion):
    problem, h = make(criterion, bl.problems.ridge()), np.array([-1.0, -2.0, 0.0, -3.0])
    params = bl.newton_fit(problem, inner_args=(X, Y), tol=1e-12)(h, None)
    data, params, hparams = (moved(backend, tree) for tree in ((X, Y), params, h))
    hg = bl.hypergradient(problem, params, hparams, inner_args=data, outer_args=data, solver=bl.CG(rtol=1e-12))
    assert float(hg.value) == pytest.approx(closed_form(criterion, h), rel=1e-9)
    assert relative_error(backend.to_numpy(hg.grad), differences(lambda h: closed_form(criterion, h), h)) <= 1e-7


@pytest.mark.parametrize("criterion", ["sure", "gcv"])
@pytest.mark.parametrize("name", ["lasso", "elastic_net"])
def test_sparse_models_match_differences_of_refits(criterion, name):
    problem, x = make(criterion, getattr(bl.problems, name)()), np.array([-2.0, -1.5])
    fit = bl.newton_fit(problem, inner_args=(X, Y), tol=1e-13)

    def hparams(x):
        return {"l1": np.asarray(x[0]), "l2": np.asarray(x[1])} if name == "elastic_net" else np.asarray(x[0])

    def value(x):
        return problem.outer(fit(hparams(x), None), hparams(x), X, Y)

    params = fit(hparams(x), None)
    assert 0 < np.count_nonzero(params[0]) < D
    hg = bl.hypergradient(problem, params, hparams(x), inner_args=(X, Y), outer_args=(X, Y), solver=bl.CG(rtol=1e-12))
    leaves = [np.ravel(leaf) for leaf in (hg.grad.values() if name == "elastic_net" else [hg.grad])]
    assert relative_error(np.concatenate(leaves), differences(value, x)[: len(leaves)]) <= 1e-6


def test_the_share_of_the_lasso_is_the_size_of_its_support():
    """df is the size of the support if y + ε δ has the same support (Zou, Hastie & Tibshirani 2007)."""
    shares = []
    for seed in range(400):
        problem = bl.problems.sure(bl.problems.lasso(), 0.01, seed=seed)
        params = bl.newton_fit(problem, inner_args=(X, Y))(np.asarray(-2.0), None)
        outer = problem.outer(params, None, X, Y)
        shares.append((outer - np.mean((X @ params[0] - Y) ** 2) + 0.01**2) / (2 * 0.01**2))
    assert N * np.mean(shares) == pytest.approx(np.count_nonzero(params[0]), abs=5 * N * np.std(shares) / 20)


def test_a_search_beats_the_unpenalized_fit():
    truth = X @ np.array([1.0, -1.0, 0.0, 0.0])
    for criterion in ("sure", "gcv"):
        problem = make(criterion, bl.problems.ridge())
        fit = bl.newton_fit(problem, inner_args=(X, Y))
        found = bl.minimize(
            problem, np.zeros(D), fit=fit, inner_args=(X, Y), outer_args=(X, Y), bounds=(-12, 6), on_failure="raise"
        )
        least = np.linalg.lstsq(X, Y, rcond=None)[0]
        assert np.mean((X @ found.params[0] - truth) ** 2) < np.mean((X @ least - truth) ** 2)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"sure: expected a regression with a squared error.*got Problem"):
        bl.problems.sure(bl.problems.logistic_regression(), 1.0)
    with pytest.raises(TypeError, match=r"gcv: expected a regression with a squared error.*got FixedPoint"):
        bl.problems.gcv(bl.FixedPoint(lambda w, h: w, lambda w, h: w))
    with pytest.raises(ValueError, match=r"SURE\.sigma: expected a finite number > 0, got 0"):
        bl.problems.sure(bl.problems.ridge(), 0)
    with pytest.raises(ValueError, match=r"SURE\.sigma: expected one number for all rows, got the shape \(3,\)"):
        bl.problems.sure(bl.problems.ridge(), np.ones(3))
    with pytest.raises(TypeError, match=r"sure and gcv take the arguments \(X, y\), got 3"):
        bl.newton_fit(bl.problems.gcv(bl.problems.ridge()), inner_args=(X, Y, np.ones(N)))
