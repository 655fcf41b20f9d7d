"""Ready problems with analytic derivatives for the numpy backend. Torch and JAX differentiate the same objects."""

from bilevel.problems.k_fold import k_fold
from bilevel.problems.linear import huber, logistic_regression, poisson, ridge, svm
from bilevel.problems.quadratic import quadratic
from bilevel.problems.quadratic_program import quadratic_program
from bilevel.problems.risk import gcv, sure
from bilevel.problems.sparse_linear import elastic_net, lasso, sparse_logistic

__all__ = [
    "elastic_net",
    "gcv",
    "huber",
    "k_fold",
    "lasso",
    "logistic_regression",
    "poisson",
    "quadratic",
    "quadratic_program",
    "ridge",
    "sparse_logistic",
    "sure",
    "svm",
]
