"""Ready problems with analytic derivatives for the numpy backend. Torch and JAX differentiate the same objects."""

from bilevel.problems.k_fold import k_fold
from bilevel.problems.linear import logistic_regression, ridge
from bilevel.problems.quadratic import quadratic

__all__ = ["k_fold", "logistic_regression", "quadratic", "ridge"]
