"""Scale a linear system against under- and overflow."""

from collections.abc import Callable

from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V
from bilevel.spaces.space import Space


def power_of_two(largest: Array, space: Space[V]) -> tuple[Array, Array]:
    """Return the scale of a vector with the largest entry ``largest``, and whether it is not 1. See `scale_free`."""
    xp = space.xp
    exponent = xp.floor(xp.log2(xp.where(largest > 0, largest, 1.0)))
    extreme = (xp.abs(exponent) > 30) & xp.isfinite(exponent)
    most = 120.0 if xp.finfo(exponent.dtype).bits == 32 else 1000.0  # so that 1 / scale is finite
    return xp.exp2(xp.clip(xp.where(extreme, exponent, 0.0), -most, most)), extreme


def scale_free(
    solve: Callable[[V, V | None, Array], tuple[V, SolverInfo]], rhs: V, x0: V | None, space: Space[V]
) -> tuple[V, SolverInfo]:
    """Call solve(rhs / scale, x0 / scale, scale) and undo the scale, so that squares neither under- nor overflow.

    The scale is a power of two, so scaling is exact. It is 1 unless the largest entry is outside 2^±30.

    After a solve with the status ``NON_FINITE``, x and its residual norm are nan, because nothing can raise under jit.
    """
    scale, extreme = power_of_two(space.max_abs(rhs), space)

    def scaled(flag: Array, factor: Array, v: V) -> V:
        return space.cond(flag, lambda v: space.scale(factor, v), v)  # no copy if the factor is 1

    x, info = solve(scaled(extreme, 1 / scale, rhs), x0 if x0 is None else scaled(extreme, 1 / scale, x0), scale)
    failed = info.status == int(Status.NON_FINITE)
    factor = space.xp.where(failed, float("nan"), scale)
    info = info._replace(residual_norm=factor * info.residual_norm, rhs_norm=scale * info.rhs_norm)
    return scaled(extreme | failed, factor, x), info
