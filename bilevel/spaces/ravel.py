"""What SciPy sees of a tree: a flat float64 vector on the host."""

import numpy as np

from bilevel.protocols import Backend, Tree


def to_host(backend: Backend, tree: Tree) -> np.ndarray:
    """Return the entries of a tree as a float64 array of shape (n,)."""
    return np.asarray(backend.to_numpy(backend.space.ravel(tree)), dtype=np.float64)
