"""Combinators on linear operators, so that solvers do not each know what they do."""

from collections.abc import Callable
from typing import Any

from bilevel.options import is_python_value
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo


def damped(operator: Operator, damping: Any, space: VectorSpace) -> Operator:
    """Return v -> (A + damping I) v."""
    if is_python_value(damping) and damping == 0:
        return operator
    return lambda v: space.axpy(damping, v, operator(v))


def copy(x: Tree, space: VectorSpace) -> Tree:
    """Return a vector of new memory, for ``space.update`` to use up, or for callers to write to."""
    return space.scale(1.0, x)


def residual(operator: Operator, rhs: Tree, x: Tree, space: VectorSpace) -> Tree:
    """Return b - A x, by one product."""
    return space.axpy(-1.0, operator(x), rhs)


def scale_free(
    solve: Callable[[Tree, Tree | None, Any], tuple[Tree, SolverInfo]], rhs: Tree, x0: Tree | None, space: VectorSpace
) -> tuple[Tree, SolverInfo]:
    """Call solve(rhs / scale, x0 / scale, scale) and undo the scale, so that squares neither under- nor overflow.

    The scale is a power of two, hence exact, and 1 unless the largest entry is beyond 2^±30.
    """
    xp = space.xp
    largest = space.max_abs(rhs)
    exponent = xp.floor(xp.log2(xp.where(largest > 0, largest, 1.0)))
    extreme = (xp.abs(exponent) > 30) & xp.isfinite(exponent)
    most = 120.0 if xp.finfo(exponent.dtype).bits == 32 else 1000.0  # so that 1 / scale is finite
    scale = xp.exp2(xp.clip(xp.where(extreme, exponent, 0.0), -most, most))

    def scaled(factor: Any, v: Tree) -> Tree:
        return space.cond(extreme, lambda v: space.scale(factor, v), v)  # no copy where there is nothing to do

    x, info = solve(scaled(1 / scale, rhs), x0 if x0 is None else scaled(1 / scale, x0), scale)
    info = info._replace(residual_norm=scale * info.residual_norm, rhs_norm=scale * info.rhs_norm)
    return scaled(scale, x), info


def norm(x: Tree, space: VectorSpace) -> Any:
    """Return the Euclidean norm."""
    return space.xp.sqrt(space.dot(x, x))


def indices(like: Any, count: int, xp: Any) -> Any:
    """Return 0, 1, … count - 1, on the device of the scalar ``like``."""
    return xp.cumsum(xp.stack([xp.ones_like(like, dtype=xp.int32)] * count), 0) - 1


def identity(like: Any, count: int, xp: Any) -> Any:
    """Return the identity matrix of shape (count, count), with the dtype and device of the scalar ``like``."""
    index = indices(like, count, xp)
    return xp.where(index[:, None] == index[None, :], xp.ones_like(like), xp.zeros_like(like))
