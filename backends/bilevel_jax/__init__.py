"""The JAX backend."""

from importlib.util import find_spec

if find_spec("jax") is None:
    raise ModuleNotFoundError('bilevel_jax needs JAX, which is not installed: pip install "bilevel[jax]".', name="jax")

from bilevel_jax.backend import JaxBackend, backend
from bilevel_jax.implicit import implicit_fixed_point, implicit_minimizer, implicit_root
from bilevel_jax.space import JaxSpace
from bilevel_jax.training.differentiable import differentiable
from bilevel_jax.training.mixed_mode import mixed_mode_grad
from bilevel_jax.training.step import TrainingState, TrainingStep

__all__ = [
    "JaxBackend",
    "JaxSpace",
    "TrainingState",
    "TrainingStep",
    "backend",
    "differentiable",
    "implicit_fixed_point",
    "implicit_minimizer",
    "implicit_root",
    "mixed_mode_grad",
]
