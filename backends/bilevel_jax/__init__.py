"""The JAX backend."""

from bilevel_jax.backend import JaxBackend
from bilevel_jax.space import JaxSpace

backend = JaxBackend()

__all__ = ["JaxBackend", "JaxSpace", "backend"]
