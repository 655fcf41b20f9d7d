"""The Lasso, the elastic net and sparse logistic regression against refits and scikit-learn, in every framework."""

import numpy as np
import pytest
from frameworks import moved, relative_error
from scipy import sparse

import bilevel as bl
from bilevel.spaces.tree import tree_map

GROUPS = [0, 1, 0, 1, 0, 1, 0, -1]
NET = {"l1": np.log(0.05), "l2": np.log(0.1)}
CASES = {
    "lasso, shared": (bl.problems.lasso(), np.full((), np.log(0.1))),
    "lasso, per feature": (bl.problems.lasso(), np.linspace(-4, -2, 8)),
    "lasso, by groups": (bl.problems.lasso(GROUPS), np.array([-2.0, -3.0])),
    "elastic net, shared": (bl.problems.elastic_net(), {name: np.full((), value) for name, value in NET.items()}),
    "elastic net, by groups": (
        bl.problems.elastic_net(GROUPS),
        {"l1": np.array([-1.5, -1.0]), "l2": np.array([-1.0, -4.0])},
    ),
    "logistic, per feature": (bl.problems.sparse_logistic(), np.linspace(-4, -2, 8)),
}


def make_data(problem, seed=0, n=30):
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.standard_normal((n, 7)), np.ones(n)])
    z = X @ np.array([2.0, -1.0, 0.5, 0, 0, 0, 0, 1.0]) + rng.standard_normal(n)
    return (X, (z > 0).astype(float)) if problem == CASES["logistic, per feature"][0] else (X, z)


def entries(hparams):
    leaves = hparams.values() if isinstance(hparams, dict) else [hparams]
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def like(hparams, x):
    if not isinstance(hparams, dict):
        return x.reshape(hparams.shape)
    size = hparams["l1"].size
    return {"l1": x[:size].reshape(hparams["l1"].shape), "l2": x[size:].reshape(hparams["l2"].shape)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Return a problem, its data, its solution, λ, and the gradient by differences of refits."""
    problem, hparams = CASES[request.param]
    train, val = make_data(problem), make_data(problem, seed=1)
    fit = bl.newton_fit(problem, inner_args=train, tol=1e-13)
    x, step = entries(hparams), 1e-5
    differences = []
    for e in np.eye(x.size):
        high, low = (problem.outer(fit(like(hparams, x + s * step * e), None), hparams, *val) for s in (1, -1))
        differences.append((high - low) / (2 * step))
    w = fit(hparams, None)
    assert 0 < np.count_nonzero(w) < 8
    return problem, train, val, w, hparams, np.array(differences)


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_gradients_are_differences_of_refits(backend, case, solver):
    problem, train, val, w, hparams, differences = case
    train, val, w, hparams = (moved(backend, tree) for tree in (train, val, w, hparams))
    solver = bl.CG(rtol=1e-12) if solver == "cg" else solver
    hg = bl.hypergradient(problem, w, hparams, inner_args=train, outer_args=val, solver=solver)
    assert relative_error(entries(tree_map(backend.to_numpy, hg.grad)), differences) <= 1e-6


def test_the_product_on_the_support_is_the_full_product(case):
    problem, train, _, w, hparams, _ = case
    v = np.random.default_rng(0).standard_normal(8) * (w != 0)
    for X in (train[0], sparse.csr_array(train[0])):
        product = problem.smooth.hvp_on(w != 0, w, hparams, X, train[1])
        full = problem.smooth.hvp(w, hparams, v, X, train[1])
        assert relative_error(product(v), np.where(w != 0, full, 0)) <= 1e-13


def test_several_outputs_share_the_rows_of_the_support():
    rng = np.random.default_rng(0)
    X, W, V, y = rng.standard_normal((9, 5)), rng.standard_normal((5, 3)), rng.standard_normal((5, 3)), np.arange(9) % 3
    W[1] = V[1] = 0
    smooth = bl.problems.sparse_logistic().smooth
    full = smooth.hvp(W, None, V, X, y)
    full[1] = 0
    assert relative_error(smooth.hvp_on(W != 0, W, None, X, y)(V), full) <= 1e-13


def test_cross_validation_averages_the_folds(case):
    problem, (X, y), _, _, hparams, _ = case
    rows = np.arange(30)
    folds = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)]
    cv = bl.problems.k_fold(problem, folds)
    fit = bl.newton_fit(cv, inner_args=(X, y), tol=1e-13)
    params = fit(hparams, None)
    for solver in (bl.CG(rtol=1e-12), bl.CG(rtol=1e-12, preconditioner=lambda v: fit.precondition(v))):
        hg = bl.hypergradient(cv, params, hparams, inner_args=(X, y), outer_args=(X, y), solver=solver)
        single = [
            bl.hypergradient(problem, w, hparams, inner_args=(X[a], y[a]), outer_args=(X[b], y[b]), solver="exact").grad
            for w, (a, b) in zip(params, folds, strict=True)
        ]
        mean = np.mean([entries(grad) for grad in single], axis=0)
        assert relative_error(entries(hg.grad), mean) <= 1e-9
    assert hg.info.steps <= 3  # with the Hessian of the fits as preconditioner


class TestScikitLearn:
    """The units of the penalties, as the docstrings state them."""

    def test_lasso_and_elastic_net(self):
        linear_model = pytest.importorskip("sklearn.linear_model")
        X, y = make_data(bl.problems.lasso())
        options = {"fit_intercept": False, "tol": 1e-14, "max_iter": 100_000}
        lasso = linear_model.Lasso(0.1, **options).fit(X, y).coef_
        fit = bl.newton_fit(bl.problems.lasso(), inner_args=(X, y), tol=1e-12)
        assert relative_error(fit(np.full((), np.log(0.1)), None), lasso) <= 1e-6
        net = linear_model.ElasticNet(0.2, l1_ratio=0.3, **options).fit(X, y).coef_
        fit = bl.newton_fit(bl.problems.elastic_net(), inner_args=(X, y), tol=1e-12)
        hparams = {"l1": np.full((), np.log(0.06)), "l2": np.full((), np.log(0.14))}
        assert relative_error(fit(hparams, None), net) <= 1e-6

    def test_sparse_logistic(self):
        linear_model = pytest.importorskip("sklearn.linear_model")
        problem = bl.problems.sparse_logistic()
        X, y = make_data(problem)
        model = linear_model.LogisticRegression(
            C=1 / (30 * 0.05), l1_ratio=1, solver="saga", fit_intercept=False, tol=1e-12, max_iter=100_000
        ).fit(X, y)
        w = bl.newton_fit(problem, inner_args=(X, y), tol=1e-12)(np.full((), np.log(0.05)), None)
        assert relative_error(w, model.coef_[0]) <= 1e-6
