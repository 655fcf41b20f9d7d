"""A backend for boxed arrays, and a solver for all backends."""

from bilevel_boxed.backend import BoxedBackend
from bilevel_boxed.chebyshev import Chebyshev

backend = BoxedBackend()

__all__ = ["BoxedBackend", "Chebyshev", "backend"]
