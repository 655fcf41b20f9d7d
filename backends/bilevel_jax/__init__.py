"""The JAX backend."""

from bilevel_jax.backend import JaxBackend, backend
from bilevel_jax.implicit import implicit_minimizer
from bilevel_jax.space import JaxSpace

__all__ = ["JaxBackend", "JaxSpace", "backend", "implicit_minimizer"]
