"""Held-out loss of penalties per group against a shared penalty, random search and Optuna, at equal wall time.

    OMP_NUM_THREADS=1 python benchmarks/penalties_per_group.py

Six data sets from the data that scikit-learn ships. Regressions have `TunedElasticNet` against `ElasticNetCV`, and
classifications of two classes have `TunedLogisticRegression` against `LogisticRegressionCV`. Random search and Optuna
(optional: pip install optuna) search the same penalties per group, in the same bounds, with the same folds and fits
(`bl.newton_fit`). They get the time that our estimator took, and at least one evaluation. The losses of 10 random
splits are of the rows that are not used for training: the mean squared error relative to the variance, or the log loss.
"""

import argparse
import importlib.util
import time
import warnings

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import PolynomialFeatures, SplineTransformer

import bilevel as bl
from bilevel.sklearn import TunedElasticNet, TunedLogisticRegression

ROWS = 200  # of training, at most half of all
C_BOUNDS = (1e-3, 1e6)


def quadratic(X):
    """Return all products of degree up to 2, in the groups: features, squares, products."""
    make = PolynomialFeatures(2, include_bias=False).fit(X)
    powers = make.powers_
    groups = np.where(powers.sum(1) == 1, 0, np.where((powers == 2).any(1), 1, 2))
    return make.transform((X - X.mean(0)) / X.std(0)), groups


def splines(X):
    """Return cubic splines with five knots, in a group per feature."""
    bases = [SplineTransformer(5, include_bias=False).fit_transform(X[:, [j]]) for j in range(X.shape[1])]
    return np.hstack(bases), np.repeat(np.arange(X.shape[1]), bases[0].shape[1])


def data_sets():
    """Return name -> (X, y, groups), with y of 0 and 1 for classifications."""
    diabetes, targets = load_diabetes(return_X_y=True)
    cancer, benign = load_breast_cancer(return_X_y=True)
    wine, cultivar = load_wine(return_X_y=True)
    digits, numbers = load_digits(return_X_y=True)
    two = np.isin(numbers, (3, 8))
    continuous = np.array([len(np.unique(column)) > 10 for column in diabetes.T])
    return {
        "diabetes, quadratic": (*quadratic(diabetes), targets),
        "diabetes, splines": (*splines(diabetes[:, continuous]), targets),
        "breast cancer": (cancer, np.repeat([0, 1, 2], 10), benign),  # mean, standard error and worst of 10 measures
        "breast cancer, splines": (*splines(np.log1p(cancer)), benign),
        "wine, quadratic": (*quadratic(wine), (cultivar == 1).astype(int)),
        "digits 3 and 8": (digits[two], np.repeat(np.arange(8), 8), (numbers[two] == 8).astype(int)),  # rows of pixels
    }


class Task:
    """One split of one data set, with the loss of a model and the cross-validated loss of log penalties per group."""

    def __init__(self, data, seed):
        X, self.groups, y = data
        self.regression = len(np.unique(y)) > 2
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = np.split(order, [min(ROWS, len(y) // 2)])
        X = X[:, X[train].std(0) > 0]
        self.groups = self.groups[data[0][train].std(0) > 0]
        X = (X - X[train].mean(0)) / X[train].std(0)
        if self.regression:
            y = (y - y[train].mean()) / y[train].std()
        self.X, self.y, self.X_test, self.y_test = X[train], y[train], X[test], y[test]
        splitter = KFold(5) if self.regression else StratifiedKFold(5)
        self.folds = list(splitter.split(self.X, self.y))
        ready = bl.problems.elastic_net if self.regression else bl.problems.logistic_regression
        self.problem = ready([*self.groups, -1])
        self.design = np.column_stack([self.X, np.ones(len(self.X))]), self.y.astype(float)

    @property
    def bounds(self):
        """The bounds of the log penalties: of each group, first L1, then L2."""
        count = self.groups.max() + 1
        if not self.regression:
            return np.tile(np.log(C_BOUNDS) - np.log(0.8 * len(self.y)), (count, 1))
        largest = np.abs(self.X.T @ self.y).max() / len(self.y)
        return np.repeat(np.log([[1e-3 * largest, largest], [1e-4, 1e3]]), count, axis=0)

    def hparams(self, logs):
        return dict(zip(("l1", "l2"), np.split(logs, 2), strict=True)) if self.regression else logs

    def evaluator(self):
        """Return log penalties -> the cross-validated loss. Each fit starts from the last."""
        cv = bl.problems.k_fold(self.problem, self.folds)
        fit = bl.newton_fit(cv, inner_args=self.design, tol=1e-6)
        params = None

        def value(logs):
            nonlocal params
            params = fit(self.hparams(logs), params)
            return float(cv.outer(params, self.hparams(logs), *self.design))

        return value

    def refit(self, logs):
        """Return the held-out loss of a fit on all training rows."""
        w = bl.newton_fit(self.problem, inner_args=self.design)(self.hparams(logs), None)
        return self.loss(self.X_test @ w[:-1] + w[-1])

    def loss(self, scores):
        if self.regression:
            return float(np.mean((scores - self.y_test) ** 2))
        return float(np.mean(np.logaddexp(0, np.where(self.y_test > 0, -scores, scores))))


def ours(task):
    """Return the held-out loss of our estimator with a penalty per group."""
    make = TunedElasticNet if task.regression else TunedLogisticRegression
    model = make(penalty=task.groups, cv=task.folds).fit(task.X, task.y)
    return task.loss(model.predict(task.X_test) if task.regression else model.decision_function(task.X_test))


def shared(task):
    """Return the held-out loss of scikit-learn's cross-validation of a shared penalty."""
    if task.regression:
        model = ElasticNetCV(l1_ratio=[0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 1], cv=task.folds, max_iter=10_000)
        return task.loss(model.fit(task.X, task.y).predict(task.X_test))
    options = {"scoring": "neg_log_loss", "max_iter": 1000, "use_legacy_attributes": False, "l1_ratios": (0,)}
    model = LogisticRegressionCV(Cs=np.logspace(-6, 3, 20), cv=task.folds, **options)
    return task.loss(model.fit(task.X, task.y).decision_function(task.X_test))


def random_search(task, seconds, seed):
    """Return the held-out loss of the best of random penalties per group."""
    value, rng, start = task.evaluator(), np.random.default_rng(seed), time.perf_counter()
    trials = []
    while not trials or time.perf_counter() - start < seconds:
        logs = rng.uniform(*task.bounds.T)
        trials.append((value(logs), tuple(logs)))
    return task.refit(np.array(min(trials)[1]))


def optuna_search(task, seconds, seed):
    """Return the held-out loss of the best penalties per group that Optuna finds."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    value, bounds = task.evaluator(), task.bounds
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))

    def objective(trial):
        return value(np.array([trial.suggest_float(str(i), *pair) for i, pair in enumerate(bounds)]))

    study.optimize(objective, timeout=seconds)
    return task.refit(np.array([study.best_params[str(i)] for i in range(len(bounds))]))


def compare(data, splits):
    """Return name -> the losses of all splits."""
    losses = {}
    for seed in range(splits):
        task = Task(data, seed)
        start = time.perf_counter()
        found = {"ours": ours(task)}
        seconds = time.perf_counter() - start
        found |= {"seconds": seconds, "shared": shared(task), "random": random_search(task, seconds, seed)}
        if importlib.util.find_spec("optuna"):
            found["Optuna"] = optuna_search(task, seconds, seed)
        for name, value in found.items():
            losses.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in losses.items()}


def main():
    """Compare the methods, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--only", default="", help="a part of the name of a data set")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| data | seconds | per group | shared penalty | random search | Optuna |\n|---|---|---|---|---|---|")
    for name, data in data_sets().items():
        if options.only not in name:
            continue
        losses = compare(data, options.splits)
        mine = losses["ours"]
        row = [f"{losses['seconds'].mean():.2f}", f"{mine.mean():.4f}"]
        for other in ("shared", "random", "Optuna"):
            if other in losses:
                change = losses[other] - mine
                row.append(f"{change.mean():+.4f} ± {change.std(ddof=1) / len(change) ** 0.5:.4f}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print("\nOther columns: the loss minus the loss of a penalty per group, so a positive number is worse than ours.")


if __name__ == "__main__":
    main()
