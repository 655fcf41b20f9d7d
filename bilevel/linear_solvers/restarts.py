"""Restarts of an iterative method: the warm start, the stop rule, and checks of the residual by products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import scale_free
from bilevel.options import check_int, check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.space import Space

ROUNDS = 4  # cycles; the second usually reaches the precision of the dtype
DRIFT = 50  # after more steps, the residual of a recurrence is checked


@dataclass(frozen=True)
class Iterative(LinearSolver[S]):
    """The options that the iterative solvers share."""

    remedy: ClassVar[str] = "Raise maxiter, loosen rtol, or add damping."

    maxiter: int = 200
    rtol: float | None = 1e-5
    atol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "maxiter", least=0)
        check_real(self, "rtol", none=True)
        check_real(self, "atol", "damping")

    @property
    @override
    def most_steps(self) -> int:
        return self.maxiter


class Cycle(NamedTuple, Generic[V]):
    """The end of one run of a method, from its recurrences, before the check by a product."""

    x: V
    norm: Array  # of the residual
    steps: Array  # of all cycles
    status: Array
    scale: Array  # a lower bound of the norm of A, from the products of all cycles


RunCycle = Callable[[V, V, Array, Array, Array, Array], Cycle[V]]


class Reach(NamedTuple):
    """Largest distances from the start of a cycle to its end.

    Attributes:
        far: ‖r‖ / (‖A‖ eps^(2/3)). Further away, rounding errors leave a residual of eps^(1/3) ‖r‖ or more, and x has
            moved along a direction that A maps to zero, to rounding. A loose tolerance allows for more.
        near: ‖r‖ / (‖A‖ √eps), for an x that does not solve the system.
    """

    far: Array
    near: Array


def reach(residual_norm: Array, scale: Array, tolerance: Array, space: Space[V]) -> Reach:
    """Return the largest distances, by the norm of the first residual and an estimate of the norm of A."""
    xp, eps = space.xp, space.eps
    scale = xp.where(scale > 0, scale, 1.0)
    far = xp.maximum(residual_norm / eps ** (2 / 3), tolerance / eps)
    return Reach(far / scale, residual_norm / (eps**0.5 * scale))


class _State(NamedTuple, Generic[V]):
    start: V  # of the cycle
    x: V
    r: V
    norm: Array
    confirmed: Array  # norm of the last residual from a product
    steps: Array
    status: Array
    scale: Array
    live: Array


def solve_with_restarts(
    cycle: RunCycle[V],
    A: LinearOperator[V],
    b: V,
    x0: V | None,
    *,
    maxiter: int,
    rtol: Number | None,
    atol: Number = 0.0,
    rounds: int = ROUNDS,
    progress: float = 0.5,
    stand_in: Callable[[V], V] | None = None,
) -> tuple[V, SolverInfo]:
    """Solve A x = b by cycles of a method until ``norm(b - A x) <= max(rtol * norm(b), atol)``.

    In floating point, the residual of a recurrence drifts from the true residual. So a product checks each cycle that
    reports convergence. If the residual is too large, the next cycle starts from the true residual, as long as cycles
    make progress. A cycle is undone if its recurrence reports a smaller residual but the true residual has grown.

    Args:
        cycle: (x, r, steps, live, tolerance, scale) -> `Cycle`, from x with the residual r. If ``live`` is false, it
            must do nothing. It ends with ``CONVERGED`` below the tolerance, with ``MAXITER`` at ``maxiter`` steps of
            all cycles, or with another failure.
        A: the operator, with its damping.
        b: the right-hand side.
        x0: a warm start, at one product. It is ignored for b = 0, whose solution is zero.
        maxiter, rtol, atol: as in `CG`.
        rounds: maximum number of cycles.
        progress: continue while a cycle leaves less than this share of the residual.
        stand_in: b -> the result if the first step from zero meets negative curvature. None: zero.
    """
    space, xp = A.space, A.space.xp

    def solve(b: V, x0: V | None, scale: Array) -> tuple[V, SolverInfo]:
        rhs_norm = space.norm(b)
        # No solve can be more precise than the dtype's epsilon.
        relative = 0.0 if rtol is None else rtol
        tolerance = xp.maximum(relative * rhs_norm, space.eps * rhs_norm)
        tolerance = xp.maximum(tolerance, atol / scale * xp.ones_like(rhs_norm))

        def check(s: _State[V]) -> _State[V]:
            r = A.residual(b, s.x)
            size = space.norm(r)
            claimed, met = s.status == int(Status.CONVERGED), size <= tolerance
            undecided = claimed | (s.status == int(Status.MAXITER))
            status = xp.where(met, int(Status.CONVERGED), xp.full_like(s.status, int(Status.MAXITER)))
            status = xp.where(xp.isfinite(size), status, int(Status.NON_FINITE))
            # A residual may grow, as in CG, but not if the recurrence reports a smaller one.
            worse = (size > s.confirmed) & (s.norm <= s.confirmed)
            return s._replace(
                x=space.where(worse, s.start, s.x),
                r=r,
                norm=xp.where(worse, s.confirmed, size),
                confirmed=size,
                status=xp.where(undecided, status, s.status),
                live=claimed & ~met & (size < progress * s.confirmed) & (s.steps < maxiter),
            )

        def round_(s: _State[V]) -> _State[V]:
            end = cycle(s.x, s.r, s.steps, s.live, tolerance, s.scale)
            short = (end.status == int(Status.MAXITER)) & (end.steps == maxiter) & (end.steps <= DRIFT)
            doubtful = s.live & ~short
            s = s._replace(
                start=s.x,
                x=end.x,
                norm=xp.where(s.live, end.norm, s.norm),
                steps=end.steps,
                status=xp.where(s.live, end.status, s.status),
                scale=xp.where(s.live, end.scale, s.scale),
                live=s.live & False,
            )
            return space.cond(doubtful, check, s)

        if x0 is None:
            x, r = space.zeros(), b
        else:
            x = space.where(rhs_norm > 0, x0, space.zeros())
            r = space.where(rhs_norm > 0, A.residual(b, x), b)
        size = space.norm(r)
        met, finite = size <= tolerance, xp.isfinite(size)
        steps = xp.zeros_like(size, dtype=xp.int32)
        status = xp.where(met, int(Status.CONVERGED), xp.full_like(steps, int(Status.MAXITER)))
        status = xp.where(finite, status, int(Status.NON_FINITE))
        zero = xp.zeros_like(size)
        s = _State(x, x, r, size, size, steps, status, scale=zero, live=~met & finite & (maxiter > 0))
        s = space.while_loop(lambda s: s.live, round_, s, rounds)

        def fill_nan(s: _State[V]) -> _State[V]:
            """Return nan, because nothing can raise under jit."""
            return s._replace(x=space.scale(float("nan"), b), norm=s.norm + float("nan"))

        s = space.cond(s.status == int(Status.NON_FINITE), fill_nan, s)
        return s.x, SolverInfo(s.steps, s.norm, rhs_norm, s.status)

    def solve_or_stand_in(b: V, x0: V | None, scale: Array) -> tuple[V, SolverInfo]:
        x, info = solve(b, x0, scale)
        if stand_in is None or x0 is not None:
            return x, info
        fallback = stand_in

        def replaced(answer: tuple[V, SolverInfo]) -> tuple[V, SolverInfo]:
            x = fallback(b)
            return x, answer[1]._replace(residual_norm=space.norm(A.residual(b, x)))

        immediate = (info.status == int(Status.NEGATIVE_CURVATURE)) & (info.steps == 1)
        return space.cond(immediate, replaced, (x, info))

    return scale_free(solve_or_stand_in, b, x0, space)
