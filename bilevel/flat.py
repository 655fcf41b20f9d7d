"""What SciPy sees of a problem: flat float64 vectors on the host, and an objective's value with its gradient."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.protocols import Backend, Tree


def to_host(backend: Backend, tree: Tree) -> np.ndarray:
    """Return the entries of a tree as a float64 array of shape (n,)."""
    return np.asarray(backend.to_numpy(backend.space.ravel(tree)), dtype=np.float64)


@dataclass(frozen=True)
class AsOuter:
    """An inner objective in the place of an outer one, of which backends take the value and first derivatives."""

    inner: Any

    def __call__(self, *args: Any) -> Any:
        return self.inner(*args)

    def grad(self, *args: Any) -> tuple[Tree, None]:
        """Return the pair that the numpy backend expects; the other backends differentiate the call."""
        if not hasattr(self.inner, "grad"):
            raise TypeError(
                f"the inner objective ({getattr(self.inner, '__name__', type(self.inner).__name__)}) has no method "
                "'grad', which the numpy backend needs (see bilevel.problems). The torch and jax backends derive it."
            )
        return self.inner.grad(*args), None
