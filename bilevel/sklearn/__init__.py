"""Estimators of scikit-learn that tune their penalties by hypergradients."""

from importlib.util import find_spec

if find_spec("sklearn") is None:
    raise ModuleNotFoundError(
        'bilevel.sklearn needs scikit-learn, which is not installed: pip install "bilevel[sklearn]".', name="sklearn"
    )

from bilevel.sklearn.elastic_net import TunedElasticNet
from bilevel.sklearn.lasso import TunedLasso
from bilevel.sklearn.linear_svc import TunedLinearSVC
from bilevel.sklearn.logistic_regression import TunedLogisticRegression, TunedSparseLogisticRegression
from bilevel.sklearn.plots import plot_penalties, plot_search
from bilevel.sklearn.ridge import TunedRidge

__all__ = [
    "TunedElasticNet",
    "TunedLasso",
    "TunedLinearSVC",
    "TunedLogisticRegression",
    "TunedRidge",
    "TunedSparseLogisticRegression",
    "plot_penalties",
    "plot_search",
]
