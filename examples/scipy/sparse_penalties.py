"""A penalty for every feature of sparse logistic regression, from the shared one that `LogisticRegressionCV` finds.

On the same five folds, `bl.minimize` goes on to lower the loss that cross-validation measures, by its gradient in all
penalties. They may only rise, so that useless features fade: free to fall, they would overfit the folds. ``--data DIR``
reads LIBSVM's a9a and a9a.t; without it, data of that size and kind are made, where a tenth of the features matter.

    python examples/scipy/sparse_penalties.py --rows 4000
    python examples/scipy/sparse_penalties.py --data DIR
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse, special
from sklearn.datasets import load_svmlight_files
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

import bilevel as bl

FOLDS = 5
SMALLEST_C = 1e-4  # of the ten that LogisticRegressionCV tries
SOLVER = {"name": "cg", "rtol": 1e-3, "maxiter": 500, "preconditioner": "diagonal"}  # for penalties decades apart


def read(directory: Path) -> tuple[Any, ...]:
    """Return features and labels, to train on and to test."""
    files = [directory / name for name in ("a9a", "a9a.t")]
    for file in files:
        if not file.is_file():
            raise SystemExit(f"--data: expected a folder with LIBSVM's a9a and a9a.t, but there is no {file}")
    return tuple(load_svmlight_files([str(file) for file in files]))


def make(seed: int, features: int = 123, groups: int = 14) -> tuple[Any, ...]:
    """Return made ones: of each group of features one is on, some hardly ever; of a tenth of them the label depends."""
    rng, rows, test_rows = np.random.default_rng(seed), 32_560, 16_281
    edges = [0, *sorted(rng.choice(np.arange(1, features), groups - 1, replace=False)), features]
    on = np.stack([low + rng.geometric(0.3, rows + test_rows) % (high - low) for low, high in pairwise(edges)], axis=1)
    X = sparse.csr_array((np.ones(on.size), on.ravel(), groups * np.arange(len(on) + 1)), (len(on), features))
    z = X @ np.where(rng.random(features) < 0.1, 1.5 * rng.standard_normal(features), 0.0)
    y = rng.random(len(on)) < special.expit(z - z.mean() - 1)
    return X[:rows], y[:rows], X[rows:], y[rows:]


def with_ones(X: Any) -> Any:
    """Append a column of ones, whose weight is the intercept, and index by 32 bits: by 64, X.T @ z takes longer."""
    X = sparse.hstack([X, np.ones((X.shape[0], 1))], format="csr")
    return sparse.csr_array((X.data, X.indices.astype(np.int32), X.indptr.astype(np.int32)), X.shape)


def fit(X: Any, y: Any, C: Any, start: Any) -> Any:
    """Minimize Σ log loss + ½ Σ w²/C, a C per feature: scikit-learn's problem, in features times the roots of C."""
    roots = np.sqrt(C)
    model = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-8, fit_intercept=False, warm_start=True)
    model.coef_ = (start / roots)[None]
    return model.fit(X @ sparse.diags_array(roots), y).coef_[0] * roots


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Tune both ways, print a table, and return what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with a9a and a9a.t; default: made data")
    parser.add_argument("--rows", type=int, help="how many examples to train on; default: all")
    parser.add_argument("--steps", type=int, default=10, help="iterations of bl.minimize (10)")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="a file with a table [solver]; default: CG")
    parser.add_argument("--seed", type=int, default=0, help="of made data, rows and folds (0)")
    arguments = parser.parse_args(argv)
    solver = bl.get_solver(arguments.config or SOLVER)

    X, y, X_test, y_test = make(arguments.seed) if arguments.data is None else read(arguments.data)
    rows = np.random.default_rng(arguments.seed).permutation(len(y))[: arguments.rows]
    X, y, X_test, y_test = with_ones(X[rows]), y[rows] > 0, with_ones(X_test), y_test > 0
    d, folds = X.shape[1], list(StratifiedKFold(FOLDS, shuffle=True, random_state=arguments.seed).split(X, y))

    # The folds are one problem: X is block diagonal, w holds the weights of each fold, and they share the penalties.
    problem = bl.problems.logistic_regression(groups=np.tile(np.arange(d), FOLDS))
    train, validation = (
        (sparse.block_diag([X[part] for part in parts], format="csr"), np.concatenate([y[part] for part in parts]))
        for parts in zip(*folds, strict=True)
    )
    n = len(train[1])  # the problem's loss is a mean, scikit-learn's a sum: C = 1/(n exp(λ))

    def fit_folds(hparams: Any, params: Any) -> Any:
        starts = np.split(params, FOLDS)
        return np.concatenate(
            [fit(X[on], y[on], np.exp(-hparams) / n, w) for (on, _), w in zip(folds, starts, strict=True)]
        )

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of defaults that are about to change
        cv = LogisticRegressionCV(cv=folds, scoring="neg_log_loss", max_iter=1000).fit(X[:, :-1], y)
    split, best = time.perf_counter(), np.ravel(cv.C_)[0]
    hparams0, params0 = np.full(d, -np.log(n * best)), np.zeros(FOLDS * d)
    found = bl.minimize(
        problem,
        hparams0,
        fit=fit_folds,
        params0=params0,
        inner_args=train,
        outer_args=validation,
        solver=solver,
        bounds=(-np.log(n * best), -np.log(n * SMALLEST_C)),
        maxiter=arguments.steps,
    )
    C = np.exp(-found.x) / n
    w = fit(X, y, C, np.zeros(d))  # on all folds, as LogisticRegressionCV ends, too
    ended = time.perf_counter()

    def report(label: str, params: Any, w: Any, seconds: float) -> dict[str, Any]:
        losses = problem.outer(params, None, *validation), problem.outer(w, None, X_test, y_test)
        accuracy = np.mean((X_test @ w > 0) == y_test)
        print(f"{label:<38}{losses[0]:>12.5f}{losses[1]:>10.5f}{accuracy:>10.2%}{seconds:>9.1f}")
        return {"validation": losses[0], "test": losses[1], "accuracy": accuracy, "seconds": seconds}

    print(f"{f'{len(y):,} examples, {d - 1} features':<38}{'validation':>12}{'test':>10}{'accuracy':>10}{'seconds':>9}")
    params, cv_w = fit_folds(hparams0, params0), np.append(cv.coef_, cv.intercept_)
    shared = report(f"LogisticRegressionCV: C = {best:.2g} for all", params, cv_w, split - began)
    tuned = report("then bl.minimize: a C per feature", found.params, w, ended - split)
    print(f"\n{found.nfev} hypergradients, {sum(e.steps for e in found.history)} products, by {solver}")
    return {"shared": shared, "tuned": tuned, "C": C, "shared C": best, "solver": solver}


if __name__ == "__main__":
    main()
