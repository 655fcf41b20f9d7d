"""Index arrays and identity matrices on the device of a scalar."""

from bilevel.spaces.array import Array, V
from bilevel.spaces.space import Space


def indices(like: Array, count: int, space: Space[V]) -> Array:
    """Return 0, 1, … count - 1, on the device of the scalar ``like``."""
    xp = space.xp
    return xp.cumsum(xp.stack([xp.ones_like(like, dtype=xp.int32)] * count), 0) - 1


def identity(like: Array, count: int, space: Space[V]) -> Array:
    """Return the identity matrix of shape (count, count), with the dtype and device of the scalar ``like``."""
    xp, index = space.xp, indices(like, count, space)
    return xp.where(index[:, None] == index[None, :], xp.ones_like(like), xp.zeros_like(like))
