"""Conjugate gradients for many right-hand sides, which share one Krylov space."""

from collections.abc import Callable
from typing import Generic, NamedTuple

from bilevel.linear_solvers.restarts import ROUNDS
from bilevel.operators.indices import identity
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.rows import Rows

KEPT = 0.1  # times the tolerance: a smaller residual gives no more directions
DEPENDENT = 10  # times eps: a smaller square of a relative length is rounding noise


class _State(NamedTuple, Generic[V]):
    """The state between two steps of a cycle."""

    x: V  # here and below, rows
    r: V  # residuals, by their recurrence
    p: V  # search directions: orthonormal rows, and zeros
    Ap: V
    inverse: Array  # of the matrix of all p·Ap
    sizes: Array  # norms of the residuals
    largest: Array  # largest eigenvalue of a matrix of p·Ap so far, a lower bound of the norm of A
    steps: Array  # number of steps until each row was solved
    total: Array  # number of steps of the block, in all cycles
    failure: Array  # a `Status`, CONVERGED if there is none
    axis: Array  # the combination of p with the smallest curvature
    live: Array


class _Round(NamedTuple, Generic[V]):
    """The state between two cycles. The other fields are as in `_State`."""

    x: V
    r: V  # true residuals
    lowest: V  # the direction of the smallest curvature in the last step
    sizes: Array
    steps: Array
    total: Array
    failure: Array
    largest: Array
    live: Array


def solve_block(
    A: LinearOperator[V],
    b: V,
    x0: V | None,
    rows: Rows[V],
    *,
    precondition: Callable[[V], V],
    maxiter: int,
    rtol: Number,
    atol: Number,
) -> tuple[V, SolverInfo, V]:
    """Solve A x = b for all rows of b by block CG (O'Leary, Linear Algebra Appl. 1980).

    A step minimizes the error of each row over the directions of all rows. It takes one product per row. The directions
    are orthonormal combinations of the residuals. Dependent directions are left out, and so are the residuals of
    solved rows. The part of a residual that a step leaves out stays in the residual of its row, and a later step can
    use it. So no breakdown is possible (compare Robbé & Sadkane, Linear Algebra Appl. 2006).

    Products compute the true residuals at the end of a cycle. Another cycle follows if the recurrence of a row has
    drifted: it reported convergence, but the true residual is above the tolerance.

    Args:
        A: the operator with its damping, for one row.
        b, x0: rows of right-hand sides and warm starts.
        rows: the space of the rows.
        precondition: rows -> preconditioned rows.
        maxiter, rtol, atol: as in `CG`.

    Returns:
        The rows of x, the info with arrays of shape (Q,), and the direction of the smallest curvature in the last step.
        A direction without positive curvature, or a nan, ends the solve for all rows, and each unsolved row has this
        status. The direction may come from other rows. So CG for one row may still find its solution.
    """
    space, whole = A.space, rows.whole
    xp, eps = space.xp, space.eps
    rhs_norms = rows.norms(b)
    usable = xp.isfinite(rhs_norms)
    b, norms = rows.where(usable, b, whole.zeros()), xp.where(usable, rhs_norms, 0.0)
    least = xp.maximum(xp.maximum(rtol * norms, eps * norms), atol * xp.ones_like(norms))
    unit = identity(norms[0], len(norms), space)

    def unsolved(sizes: Array, x: V) -> Array:
        return ~(sizes <= rows.batched(A.tolerance, least, x))

    def step(s: _State[V]) -> _State[V]:
        kept = s.sizes > KEPT * least
        p = rows.scale(xp.where(kept, 1.0 / xp.where(kept, s.sizes, 1.0), 0.0), s.r)
        p = precondition(p)
        for _ in range(2):  # make p conjugate to the last p; one pass is inaccurate in float32
            p = rows.minus(p, whole.gram(p, s.Ap) @ s.inverse, s.p)
        basis, dropped = orthonormal(whole.gram(p, p))
        p = whole.combine(basis, p)
        Ap = rows.batched(A, p)
        curvature, overlap = whole.gram(p, Ap), whole.gram(s.r, p)
        finite = xp.isfinite(xp.sum(curvature) + xp.sum(overlap))
        curvature = xp.where(finite, (curvature + curvature.T) / 2, unit)  # LAPACK wrappers raise for nan
        # A direction that is left out gets a positive curvature. It has no other effect, because it is zero.
        scale = xp.max(xp.abs(curvature))
        values, axes = xp.linalg.eigh(curvature + unit * xp.where(dropped, scale, 0.0)[:, None])
        largest = xp.maximum(s.largest, xp.max(xp.abs(values)))
        positive = values > eps * largest
        inverse = (axes * xp.where(positive, 1.0 / xp.where(positive, values, 1.0), 0.0)[None, :]) @ axes.T
        ok = s.live & finite
        alpha = overlap @ inverse
        x = whole.axpby_where(ok, 1.0, whole.combine(alpha, p), s.x)
        r = whole.axpby_where(ok, -1.0, whole.combine(alpha, Ap), s.r)
        sizes = rows.norms(r)
        finite = finite & xp.isfinite(xp.sum(sizes))
        curved = ~xp.all(positive)
        failure = xp.where(curved, int(Status.NEGATIVE_CURVATURE), s.failure)
        failure = xp.where(finite, failure, int(Status.NON_FINITE))
        open_before, still_open = unsolved(s.sizes, s.x), unsolved(sizes, x)
        return _State(
            x=x,
            r=r,
            p=whole.where(ok, p, s.p),
            Ap=whole.where(ok, Ap, s.Ap),
            inverse=xp.where(ok, inverse, s.inverse),
            sizes=xp.where(ok, sizes, s.sizes),
            largest=xp.where(ok, largest, s.largest),
            steps=xp.where(s.live & open_before, s.total + 1, s.steps),
            total=xp.where(s.live, s.total + 1, s.total),
            failure=xp.where(s.live, failure, s.failure),
            axis=xp.where(ok, axes[:, 0], s.axis),
            live=ok & finite & ~curved & xp.any(still_open) & (s.total + 1 < maxiter),
        )

    def orthonormal(gram: Array) -> tuple[Array, Array]:
        """Return the matrix that makes rows orthonormal, and for each new row whether it is left out, as zero."""
        squares = xp.sum(gram * unit, 1)
        positive = xp.isfinite(xp.sum(gram)) & (squares > 0)
        factors = xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, squares, 1.0)), 0.0)
        cosines = xp.where(positive[:, None] & positive[None, :], factors[:, None] * gram * factors[None, :], 0.0)
        values, axes = xp.linalg.eigh(cosines)
        dropped = ~(values > DEPENDENT * eps * len(norms) * values[-1])
        lengths = xp.where(dropped, 0.0, 1.0 / xp.sqrt(xp.where(dropped, 1.0, values)))
        return lengths[:, None] * axes.T * factors[None, :], dropped

    def cycle(s: _Round[V]) -> _Round[V]:
        """Run block CG from the true residuals. Compute the true residuals at its end."""
        zero = whole.zeros()
        start = _State(
            x=whole.copy(s.x),
            r=whole.copy(s.r),
            p=zero,
            Ap=zero,
            inverse=xp.zeros_like(unit),
            sizes=s.sizes,
            largest=s.largest,
            steps=s.steps,
            total=s.total,
            failure=s.failure,
            axis=norms * 0,
            live=s.live,
        )
        end = whole.while_loop(lambda s: s.live, step, start, maxiter)
        r = whole.subtract(b, rows.batched(A, end.x))
        sizes = rows.norms(r)
        drifted = unsolved(sizes, end.x) & ~unsolved(end.sizes, end.x)
        progress = xp.any(drifted & (sizes < 0.5 * s.sizes))
        live = progress & (end.failure == int(Status.CONVERGED)) & (end.total < maxiter)
        lowest = rows.first(whole.combine(end.axis[None, :], end.p))
        return _Round(end.x, r, lowest, sizes, end.steps, end.total, end.failure, end.largest, live)

    if x0 is None:
        x, r = whole.zeros(), b
    else:
        x = rows.where(norms > 0, x0, whole.zeros())
        r = whole.subtract(b, rows.batched(A, x))
    sizes = rows.norms(r)
    steps = xp.zeros_like(norms, dtype=xp.int32)
    zero = steps[0]
    live = xp.any(unsolved(sizes, x)) & (maxiter > 0)
    s = _Round(x, r, space.zeros(), sizes, steps, zero, zero, xp.zeros_like(norms[0]), live)
    s = whole.while_loop(lambda s: s.live, lambda s: whole.cond(s.live, cycle, s), s, ROUNDS)
    failure = xp.where(s.failure == int(Status.CONVERGED), int(Status.MAXITER), s.failure)
    status = xp.where(unsolved(s.sizes, s.x), failure, int(Status.CONVERGED))
    status = xp.where(usable, status, int(Status.NON_FINITE))
    nan = norms + float("nan")
    zeros = xp.zeros_like(norms)
    return s.x, SolverInfo(s.steps, s.sizes, rhs_norms, status, nan, nan, zeros, zeros), s.lowest
