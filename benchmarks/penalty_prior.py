"""Held-out gain of penalties per group over a shared penalty, by the width of their prior, on made data.

    OMP_NUM_THREADS=1 python benchmarks/penalty_prior.py

The standard deviation of a log penalty in the prior of `bilevel.sklearn` was chosen by this table. The widest is like
no prior. 200 rows have 3 to 15 groups of correlated features, and 150 rows have a ridge penalty for each of 60
features. The held-out loss of 4,000 new rows is the mean squared error relative to the variance, or the log loss.
"""

import argparse
import warnings

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from bilevel.sklearn import TunedElasticNet, TunedLogisticRegression, TunedRidge, tuned

SPREADS = (100.0, 1.0, 0.5)
NEW = 4000
GROUPS = {"one of 3 useless": (3, 20), "10 of 15 useless": (15, 5), "equal": (8, 8), "decreasing": (6, 12)}
FEATURES = {"50 of 60 useless": np.arange(60) < 10, "equal": np.ones(60), "decreasing": 1 / (1 + np.arange(60))}


def grouped(kind, seed, classify, n=200):
    """Return (groups, X, y) of n training rows and new rows."""
    rng = np.random.default_rng(seed)
    count, size = GROUPS[kind]
    groups = np.repeat(np.arange(count), size)
    common = rng.standard_normal((n + NEW, count))
    X = rng.standard_normal((n + NEW, count * size)) + 0.7 * common[:, groups]
    scales = {
        "one of 3 useless": np.array([1.0, 0.3, 0.0]),
        "10 of 15 useless": np.where(np.arange(count) % 3 == 0, 1.0, 0.0),
        "equal": np.ones(count),
        "decreasing": 2.0 ** -np.arange(count),
    }[kind]
    w = rng.standard_normal(count * size) * scales[groups]
    if kind == "10 of 15 useless":
        w *= rng.random(count * size) < 0.5
    z = X @ w / (X @ w).std()
    y = (2.5 * z + rng.logistic(size=n + NEW) > 0).astype(int) if classify else z + rng.standard_normal(n + NEW)
    return groups, (X - X[:n].mean(0)) / X[:n].std(0), y


def per_feature(kind, seed, n=150):
    """Return the same with a group for each feature."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n + NEW, 60))
    z = X @ (rng.standard_normal(60) * FEATURES[kind])
    return np.arange(60), X, z / z.std() + rng.standard_normal(n + NEW)


def loss(make, penalty, X, y):
    """Return the held-out loss of an estimator."""
    n, classify = len(y) - NEW, make is TunedLogisticRegression
    folds = list((StratifiedKFold if classify else KFold)(5).split(X[:n], y[:n]))
    model = make(penalty=penalty, cv=folds).fit(X[:n], y[:n])
    if not classify:
        return float(np.mean((model.predict(X[n:]) - y[n:]) ** 2) / np.var(y[n:]))
    scores = model.decision_function(X[n:])
    return float(np.mean(np.logaddexp(0, np.where(y[n:] > 0, -scores, scores))))


def main():
    """Print a row for each kind of data."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=12)
    seeds = range(100, 100 + parser.parse_args().seeds)
    warnings.simplefilter("ignore")
    jobs = [(TunedElasticNet, kind, lambda k, s: grouped(k, s, False)) for kind in GROUPS]
    jobs += [(TunedLogisticRegression, kind, lambda k, s: grouped(k, s, True)) for kind in GROUPS]
    jobs += [(TunedRidge, kind, per_feature) for kind in FEATURES]
    print(f"| data | {' | '.join(f'spread {spread:g}' for spread in SPREADS)} |\n|---|" + "---|" * len(SPREADS))
    for make, kind, data in jobs:
        gains = []
        for seed in seeds:
            groups, X, y = data(kind, seed)
            shared, found = loss(make, "shared", X, y), []
            for spread in SPREADS:
                tuned.SPREAD = spread
                found.append(shared - loss(make, groups, X, y))
            gains.append(found)
        error = np.std(gains, axis=0, ddof=1) / len(seeds) ** 0.5
        cells = [f"{mean:+.4f} ± {each:.4f}" for mean, each in zip(np.mean(gains, axis=0), error, strict=True)]
        print(f"| {make.__name__}, {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
