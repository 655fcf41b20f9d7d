"""The reference backend: NumPy arrays, analytic derivatives, SciPy."""

from bilevel_numpy.backend import NumpyBackend
from bilevel_numpy.space import NumpySpace

backend = NumpyBackend()

__all__ = ["NumpyBackend", "NumpySpace", "backend"]
