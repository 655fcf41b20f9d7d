"""Cross-validation as one problem: its gradient, by refits and by a loop over folds, and its messages."""

import numpy as np
import pytest
from frameworks import relative_error
from scipy import sparse

import bilevel as bl
from bilevel.testing import check_hypergradient

N, D, K = 23, 4, 3
HELD_OUT = [np.arange(k, N, K) for k in range(K)]  # of different sizes
FOLDS = [(np.setdiff1d(np.arange(N), rows), rows) for rows in HELD_OUT]
RIDGE = bl.problems.ridge()
EXACT = bl.CG(rtol=1e-12)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, D))
    return X, X @ np.array([1.0, -1.0, 0.5, 0.0]) + rng.standard_normal(N)


def minimum(hparams, X, y):
    return np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(hparams)), X.T @ y / len(y))


def refitted(hparams):
    """F after the folds are solved again, without any code of the library."""
    X, y = make_data()
    ws = [minimum(hparams, X[train], y[train]) for train, _ in FOLDS]
    return np.mean([0.5 * np.mean((X[test] @ w - y[test]) ** 2) for w, (_, test) in zip(ws, FOLDS, strict=True)])


HPARAMS = np.linspace(-2, 0, D)


def at_minimum(backend, dtype=np.float64):
    """Return params and hparams at the minimum, and the data, in a framework."""
    X, y = make_data()
    params = [backend.from_numpy(minimum(HPARAMS, X[train], y[train]).astype(dtype)) for train, _ in FOLDS]
    data = tuple(backend.from_numpy(a.astype(dtype)) for a in (X, y))
    return params, backend.from_numpy(HPARAMS.astype(dtype)), data


def test_the_gradient_is_the_derivative_of_refits(backend):
    params, hparams, data = at_minimum(backend)
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    hg = bl.hypergradient(cv, params, hparams, inner_args=data, outer_args=data, solver=EXACT)
    h = 1e-4
    differences = [(refitted(HPARAMS + h * e) - refitted(HPARAMS - h * e)) / (2 * h) for e in np.eye(D)]
    assert float(hg.value) == pytest.approx(refitted(HPARAMS), rel=1e-12)
    assert relative_error(backend.to_numpy(hg.grad), differences) <= 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_is_the_mean_of_the_gradients_of_the_folds(backend, dtype):
    params, hparams, (X, y) = at_minimum(backend, dtype)
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    hg = bl.hypergradient(cv, params, hparams, inner_args=(X, y), outer_args=(X, y), solver=bl.CG(rtol=1e-6))
    one = [
        bl.hypergradient(RIDGE, w, hparams, inner_args=(X[a], y[a]), outer_args=(X[b], y[b]), solver=bl.CG(rtol=1e-6))
        for w, (a, b) in zip(params, FOLDS, strict=True)
    ]
    assert hg.grad.dtype == params[0].dtype
    assert relative_error(backend.to_numpy(hg.grad), np.mean([backend.to_numpy(g.grad) for g in one], 0)) <= 2e-5


def test_forward_mode_agrees_with_reverse_mode(backend):
    params, hparams, data = at_minimum(backend)
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    found = [
        bl.hypergradient(
            cv,
            params,
            hparams,
            inner_args=data,
            outer_args=data,
            solver=bl.Unrolled(steps=5, step_size=0.3, mode=mode),
        )
        for mode in ("reverse", "forward")
    ]
    assert relative_error(*(backend.to_numpy(hg.grad) for hg in found)) <= 1e-12


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_array, sparse.coo_array])
def test_sparse_data_give_the_gradient_of_dense_data(kind):
    params, hparams, (X, y) = at_minimum(bl.get_backend("numpy"))
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    dense, sparse_ = (
        bl.hypergradient(cv, params, hparams, inner_args=(A, y), outer_args=(A, y), solver=EXACT).grad
        for A in (X, kind(X))
    )
    assert relative_error(sparse_, dense) <= 1e-12


class Shrink:
    """w ← w/2 + λ mean(x), whose fixed point is 2 λ mean(x)."""

    def __call__(self, w, h, x):
        return w / 2 + h * x.mean()

    def vjp_params(self, w, h, v, x):
        return v / 2

    def vjp_hparams(self, w, h, v, x):
        return v * x.mean()


class Miss:
    """F = ½ ‖w − mean(x)‖² + Σ λ."""

    def __call__(self, w, h, x):
        return 0.5 * ((w - x.mean()) ** 2).sum() + h.sum()

    def grad(self, w, h, x):
        return w - x.mean(), np.ones_like(h)


def test_folds_of_a_fixed_point_have_the_closed_form(backend):
    x = np.arange(6.0)
    folds = [([0, 1, 2], [3, 4, 5]), ([1, 5], [0, 2])]
    hparams = np.array([0.3, -0.2])
    means = [(x[train].mean(), x[test].mean()) for train, test in folds]
    params = [backend.from_numpy(2 * hparams * a) for a, _ in means]
    cv = bl.problems.k_fold(bl.FixedPoint(Shrink(), Miss()), folds)
    data = (backend.from_numpy(x),)
    options = {"inner_args": data, "outer_args": data, "solver": "gmres"}
    hg = bl.hypergradient(cv, params, backend.from_numpy(hparams), **options)
    expected = np.mean([2 * a * (2 * hparams * a - b) for a, b in means], 0) + 1
    assert relative_error(backend.to_numpy(hg.grad), expected) <= 1e-4


def test_a_search_by_refits_of_each_fold_and_by_one_fit_of_all_agree():
    data = make_data()
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    options = {"inner_args": data, "outer_args": data, "bounds": (-6, 2)}
    each = bl.minimize(cv, np.zeros(D), fit=cv.fit_each(lambda h, _, X, y: minimum(h, X, y), data), **options)
    params0 = [np.zeros(D)] * K
    together = bl.minimize(cv, np.zeros(D), fit=bl.scipy_fit(cv, inner_args=data), params0=params0, **options)
    assert each.success, each.message
    assert each.fun == pytest.approx(together.fun, rel=1e-8)
    assert each.fun == pytest.approx(refitted(each.x), rel=1e-10)
    assert each.fun < refitted(np.zeros(D))


def test_fits_of_each_fold_start_from_their_part():
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    starts = [np.full(D, float(k)) for k in range(K)]
    found = cv.fit_each(lambda h, start, X, y: start + len(y), make_data())(HPARAMS, starts)
    assert [w[0] for w in found] == [k + len(train) for k, (train, _) in enumerate(FOLDS)]


def test_problems_of_equal_folds_are_equal():
    again = [(train.copy(), list(test)) for train, test in FOLDS]
    assert bl.problems.k_fold(RIDGE, FOLDS) == bl.problems.k_fold(RIDGE, again)
    assert hash(bl.problems.k_fold(RIDGE, FOLDS)) == hash(bl.problems.k_fold(RIDGE, again))
    assert bl.problems.k_fold(RIDGE, FOLDS) != bl.problems.k_fold(RIDGE, FOLDS[:2])


def test_check_hypergradient_accepts_it(backend):
    params, hparams, data = at_minimum(backend)
    cv = bl.problems.k_fold(RIDGE, FOLDS)
    for reference in ("exact", "finite-differences"):
        check_hypergradient(cv, params, hparams, inner_args=data, outer_args=data, solver=EXACT, reference=reference)


@pytest.mark.parametrize(
    ("folds", "error", "message"),
    [
        (5, TypeError, r"folds: expected pairs .* got int. Pass sklearn.model_selection.KFold\(5\).split\(X\)"),
        ([], ValueError, "there is no fold"),
        ([0, 1], TypeError, r"folds\[0\]: expected a pair"),
        ([([0, 1], [2]), ([0.5], [1])], TypeError, r"folds\[1\]: train must be a vector of row numbers, got float64"),
        ([(np.array([True, False]), [1])], TypeError, r"np.flatnonzero\(mask\)"),
        ([([0, 1], [])], ValueError, r"folds\[0\]: test has no rows"),
        ([([0, 1], [1, 2])], ValueError, "train and test overlap: 1 rows are in both, such as row 1"),
        ([([0, -1], [1])], ValueError, r"folds\[0\]: train has the row number -1"),
    ],
)
def test_invalid_folds_are_named(folds, error, message):
    with pytest.raises(error, match=message):
        bl.problems.k_fold(RIDGE, folds)


def test_other_mistakes_are_named():
    X, y = make_data()
    params, hparams = [np.zeros(D)] * K, HPARAMS
    cv = bl.problems.k_fold(RIDGE, FOLDS)

    def at(params=params, inner=(X, y), outer=(X, y), cv=cv):
        return bl.hypergradient(cv, params, hparams, inner_args=inner, outer_args=outer)

    with pytest.raises(TypeError, match="k_fold: expected a problem"):
        bl.problems.k_fold(lambda w, h: 0.0, FOLDS)
    with pytest.raises(ValueError, match=r"args\[0\] has 23 and args\[1\] has 22"):
        at(inner=(X, y[1:]))
    with pytest.raises(ValueError, match="the folds need 23 rows, but the arrays have 20"):
        at(outer=(X[:20], y[:20]))
    with pytest.raises(TypeError, match="takes all rows in whole arrays"):
        at(inner=bl.MicroBatches((X, y), size=23))
    with pytest.raises(ValueError, match=r"a list of 3 trees, one for each fold, got ndarray. .*\[params\] \* 3"):
        at(params=np.zeros(D))
    with pytest.raises(ValueError, match=r"params0: k_fold expects a list of 3 trees.* got a list of 2"):
        cv.fit_each(lambda h, w, X, y: w, (X, y))(HPARAMS, params[:2])
    with pytest.raises(TypeError, match="fit_each: expected a function"):
        cv.fit_each(3, (X, y))
    plain = bl.problems.k_fold(bl.Problem(RIDGE.inner, lambda w, h, X, y: 0.0), FOLDS)
    with pytest.raises(TypeError, match="has no method 'grad'"):
        at(cv=plain)
    with pytest.raises(TypeError, match="scipy_fit minimizes an inner objective"):
        bl.scipy_fit(bl.problems.k_fold(bl.FixedPoint(Shrink(), Miss()), FOLDS))
