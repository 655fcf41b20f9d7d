"""The reference backend: NumPy arrays and analytic derivatives."""

from bilevel_numpy.backend import NumpyBackend
from bilevel_numpy.space import NumpySpace

backend = NumpyBackend()

__all__ = ["NumpyBackend", "NumpySpace", "backend"]
