"""Time and held-out error of the search for one L1 penalty: `TunedLasso` against `LassoCV` and other solvers.

    OMP_NUM_THREADS=1 python benchmarks/sparse_search.py wide
    OMP_NUM_THREADS=1 python benchmarks/sparse_search.py text
    OMP_NUM_THREADS=1 python benchmarks/sparse_search.py wide --peers

"wide" has the shape of the leukemia data: 40 rows and 7,000 features that 20 factors correlate. 10 features matter,
and the noise has the variance of the signal. The held-out error is of 2,000 new rows. "text" has the shape of rcv1:
20,242 rows and 47,236 columns of Zipf frequencies, with targets of ±1, and 5,000 new rows. All methods have the same 5
folds. The rows of ``--peers`` are one search with the fits of celer and skglm (optional: pip install celer skglm).
"""
# pyright: reportMissingImports=false

import argparse
import importlib.util
import time
import warnings
from functools import partial

import numpy as np
import scipy.sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV
from sklearn.model_selection import KFold

import bilevel as bl
from bilevel.sklearn import TunedLasso

FOLDS = 5
TOLS = (1e-2, 1e-3, 1e-4, 1e-6)


def wide(seed, rows=40, features=7000, new=2000):
    """Return (X, y, new X, new y) of correlated dense features."""
    rng = np.random.default_rng(seed)
    loadings = 0.7 * rng.standard_normal((20, features))
    w = np.zeros(features)
    w[rng.choice(features, 10, replace=False)] = rng.standard_normal(10)

    def draw(count):
        X = rng.standard_normal((count, 20)) @ loadings + rng.standard_normal((count, features))
        return X / np.sqrt(1 + 20 * 0.49)

    X, X_new = draw(rows), draw(new)
    scale = (X_new @ w).std()
    y, y_new = (A @ w / scale + rng.standard_normal(len(A)) for A in (X, X_new))
    return X, y, X_new, y_new


def text(seed, rows=20_242, features=47_236, words=100, new=5000):
    """Return (X, y, new X, new y) of sparse rows of norm 1, with some 90 entries each."""
    rng = np.random.default_rng(seed)
    frequencies = 1 / (np.arange(features) + 10.0) ** 1.1
    frequencies /= frequencies.sum()
    total = rows + new
    columns = [np.unique(rng.choice(features, words, p=frequencies)) for _ in range(total)]
    lengths = np.array([len(each) for each in columns])
    entries = rng.lognormal(size=lengths.sum())
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    X = scipy.sparse.csr_array((entries, np.concatenate(columns).astype(np.int32), indptr), shape=(total, features))
    X = scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.sqrt(X.multiply(X).sum(1))) @ X)
    w = np.zeros(features)
    w[rng.choice(2000, 300, replace=False)] = 3 * rng.standard_normal(300)
    y = np.sign(X @ w + 0.5 * rng.standard_normal(total))
    return X[:rows], y[:rows], X[rows:], y[rows:]


def tuned(folds, X, y):
    """Return predict and the number of penalties tried, of our estimator."""
    model = TunedLasso(cv=folds).fit(X, y)
    return model.predict, len(model.path_alphas_) + len(model.history_)


def lasso_cv(tol, folds, X, y):
    """Return the same of scikit-learn's search."""
    model = LassoCV(cv=folds, tol=tol, max_iter=100_000).fit(X, y)
    return model.predict, len(model.alphas_)


def centered(X, y):
    """Return centered data and their means."""
    return X - X.mean(0), y - y.mean(), X.mean(0), y.mean()


def search_with(fit_one, folds, X, y):
    """Search from a tenth of the largest penalty, with another package's fit of one training set."""
    A, target, means, mean = centered(X, y)
    cv = bl.problems.k_fold(bl.problems.lasso(), folds)
    largest = np.abs(A.T @ target).max() / len(y)
    found = bl.minimize(
        cv,
        np.log(largest / 3) + np.zeros(()),
        fit=cv.fit_each(fit_one, (A, target)),
        bounds=(np.log(largest / 100), np.log(largest)),
        options={"ftol": 1e-3, "gtol": 1e-3},
        inner_args=(A, target),
        outer_args=(A, target),
    )
    w = fit_one(found.x, None, A, target)
    return lambda new: (new - means) @ w + mean, found.nfev


def newton_one(log_penalty, start, X, y):
    """Fit by `bl.newton_fit`."""
    return bl.newton_fit(bl.problems.lasso(), inner_args=(X, y), tol=1e-7)(log_penalty, start)


def celer_one(log_penalty, start, X, y):
    """Fit by celer."""
    from celer import Lasso

    return Lasso(alpha=float(np.exp(log_penalty)), fit_intercept=False, tol=1e-8).fit(np.asfortranarray(X), y).coef_


def skglm_one(log_penalty, start, X, y):
    """Fit by skglm."""
    from skglm import Lasso

    return Lasso(alpha=float(np.exp(log_penalty)), fit_intercept=False, tol=1e-8).fit(np.asfortranarray(X), y).coef_


def measured(method, folds, problem):
    """Return CPU seconds, the held-out error and the number of penalties."""
    X, y, X_new, y_new = problem
    start = time.process_time()
    predict, count = method(folds, X, y)
    seconds = time.process_time() - start
    return seconds, float(np.mean((predict(X_new) - y_new) ** 2)), count


def peers():
    """Return the searches with other packages that are installed, each after one call that compiles."""
    found = {"bl.minimize, newton_fit": partial(search_with, newton_one)}
    for name, fit in (("celer", celer_one), ("skglm", skglm_one)):
        if importlib.util.find_spec(name):
            found[f"bl.minimize, {name}"] = partial(search_with, fit)
    return found


def main():
    """Compare the methods, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", choices=["wide", "text"])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", help="a part of the name of a method")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    make, seeds = (wide, 5) if options.data == "wide" else (text, 1)
    methods = {"TunedLasso": tuned} | {f"LassoCV, tol={tol:g}": partial(lasso_cv, tol) for tol in TOLS}
    methods = peers() if options.peers else methods
    methods = {name: method for name, method in methods.items() if (options.only or "") in name}
    for method in methods.values():  # compile, load
        method(list(KFold(FOLDS).split(np.zeros((40, 1)))), *wide(99, features=50)[:2])
    rows = {name: [] for name in methods}
    for seed in range(options.seeds or seeds):
        problem = make(seed)
        folds = list(KFold(FOLDS).split(problem[1]))
        for name, method in methods.items():
            rows[name].append(measured(method, folds, problem))
            print(f"seed {seed} {name}: {rows[name][-1]}", flush=True)
    print("\n| method | CPU seconds | held-out error | penalties tried |\n|---|---|---|---|")
    for name, results in rows.items():
        seconds, error, count = np.mean(results, axis=0)
        print(f"| {name} | {seconds:.3f} | {error:.3f} | {count:.0f} |")


if __name__ == "__main__":
    main()
