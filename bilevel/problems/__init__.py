"""Ready problems with analytic derivatives for the numpy backend. Torch and JAX differentiate the same objects."""

from bilevel.problems.k_fold import k_fold
from bilevel.problems.linear import huber, logistic_regression, poisson, ridge, svm
from bilevel.problems.quadratic import quadratic

__all__ = ["huber", "k_fold", "logistic_regression", "poisson", "quadratic", "ridge", "svm"]
