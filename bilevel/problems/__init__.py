"""Ready problems with analytic derivatives for the numpy backend. Torch and JAX differentiate the same objects."""

from bilevel.problems.linear import logistic_regression, ridge
from bilevel.problems.quadratic import quadratic

__all__ = ["logistic_regression", "quadratic", "ridge"]
