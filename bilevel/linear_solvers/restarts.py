"""Restarts of an iterative method: the warm start, the stop rule, and checks of the residual by products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import scale_free
from bilevel.options import check_int, check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.space import Space

ROUNDS = 4  # cycles; the second usually reaches the precision of the dtype
DRIFT = 50  # steps, in which the residual of a recurrence does not drift


@dataclass(frozen=True)
class Iterative(LinearSolver[S]):
    """The options that the iterative solvers share."""

    remedy: ClassVar[str] = "Raise maxiter, loosen rtol, or add damping."

    maxiter: int = 200
    rtol: float | None = 1e-5
    atol: float = 0.0
    damping: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        check_int(self, "maxiter", least=0)
        check_real(self, "rtol", none=True)
        check_real(self, "atol")
        check_real(self, "damping", auto=True)

    @property
    @override
    def most_steps(self) -> int:
        return self.maxiter


class Cycle(NamedTuple, Generic[V]):
    """The end of a cycle, before a product checks it.

    Attributes:
        x: the iterate.
        residual_norm: the norm of its residual, from the recurrences of the method.
        steps: the number of steps of all cycles.
        status: ``CONVERGED`` if the method claims convergence or wants another cycle. ``MAXITER`` if it has no steps
            left, or makes no more progress. Otherwise a failure.
        norm_A: a lower bound of ‖A‖, from the products of all cycles.
    """

    x: V
    residual_norm: Array
    steps: Array
    status: Array
    norm_A: Array


RunCycle = Callable[[V, V, Array, Array, Array, Array], Cycle[V]]
"""(x, r, steps, live, tolerance, norm_A) -> the end of a cycle that starts from x with the residual r."""


class Reach(NamedTuple):
    """Limits of the distance from the start of a cycle to its end x. The residual at the start is r.

    Beyond a limit, x has moved along a direction that A maps to zero, to rounding.

    Attributes:
        far: the limit for any x, ‖r‖ / (‖A‖ eps^(2/3)). Beyond it, rounding errors leave a residual of eps^(1/3) ‖r‖ or
            more. A loose tolerance allows such errors, so tolerance / (‖A‖ eps) is the limit if it is larger.
        near: the limit for an x that does not solve the system, ‖r‖ / (‖A‖ √eps).
    """

    far: Array
    near: Array


def reach(residual_norm: Array, norm_A: Array, tolerance: Array, space: Space[V]) -> Reach:
    """Return the limits. ``residual_norm`` is ‖r‖, and ``norm_A`` is an estimate of ‖A‖."""
    xp, eps = space.xp, space.eps
    norm_A = xp.where(norm_A > 0, norm_A, 1.0)
    far = xp.maximum(residual_norm / eps ** (2 / 3), tolerance / eps)
    return Reach(far / norm_A, residual_norm / (eps**0.5 * norm_A))


class _State(NamedTuple, Generic[V]):
    x: V
    r: V  # the true residual of x, if another cycle follows
    residual_norm: Array  # of x, from a recurrence or a product
    confirmed: Array  # norm of the last residual from a product
    steps: Array
    status: Array
    norm_A: Array
    live: Array  # whether another cycle follows


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
) -> tuple[V, SolverInfo]:
    """Solve A x = b by cycles of a method until ``norm(b - A x) <= max(rtol * norm(b), atol)``.

    In floating point, the residual of a recurrence drifts from the true residual. So a product computes the true
    residual at the end of a cycle, and the true residual decides the status. Only a solve that runs out of its
    ``maxiter`` steps, at most 50, is not checked, because its recurrence has not drifted yet.

    Another cycle follows if the last one ended with ``CONVERGED``, its true residual is above the tolerance, and it has
    made progress. The new cycle starts from the true residual. A cycle is undone if its recurrence reports a smaller
    residual but the true residual has grown.

    Args:
        cycle: see `RunCycle`. If ``live`` is false, it must do nothing. It must stop at ``maxiter`` steps of all
            cycles. ``norm_A`` is the value from the last cycle, or zero.
        A: the operator, with its damping.
        b: the right-hand side.
        x0: a warm start, at one product. It is ignored for b = 0, whose solution is zero.
        maxiter, rtol, atol: as in `CG`.
        rounds: maximum number of cycles.
        progress: continue while a cycle leaves less than this share of the residual.
    """
    space, xp = A.space, A.space.xp

    def solve(b: V, x0: V | None, scale: Array) -> tuple[V, SolverInfo]:
        rhs_norm = space.norm(b)
        # No solve can be more precise than the dtype's epsilon.
        relative = 0.0 if rtol is None else rtol
        tolerance = xp.maximum(relative * rhs_norm, space.eps * rhs_norm)
        tolerance = xp.maximum(tolerance, atol / scale * xp.ones_like(rhs_norm))

        def judged(size: Array, x: V) -> Array:
            """Return the status of an iterate by the norm of its true residual."""
            unsolved = xp.full_like(size, int(Status.MAXITER), dtype=xp.int32)
            status = xp.where(size <= A.tolerance(tolerance, x), int(Status.CONVERGED), unsolved)
            return xp.where(xp.isfinite(size), status, int(Status.NON_FINITE))

        def sweep(s: _State[V]) -> _State[V]:
            """Run a cycle. Compute its true residual, which decides the status and whether another cycle follows."""
            start, end = s.x, cycle(s.x, s.r, s.steps, s.live, tolerance, s.norm_A)
            trusted = (end.status == int(Status.MAXITER)) & (end.steps == maxiter) & (end.steps <= DRIFT)

            def check(s: _State[V]) -> _State[V]:
                r = A.residual(b, s.x)
                size = space.norm(r)
                claimed, met = s.status == int(Status.CONVERGED), size <= A.tolerance(tolerance, s.x)
                failed = ~claimed & (s.status != int(Status.MAXITER))
                # A residual may grow, as in CG, but not if the recurrence reports a smaller one.
                worse = (size > s.confirmed) & (s.residual_norm <= s.confirmed)
                # After a cycle that is undone, no other cycle runs, so r may belong to the worse x.
                return s._replace(
                    x=space.where(worse, start, s.x),
                    r=r,
                    residual_norm=xp.where(worse, s.confirmed, size),
                    confirmed=size,
                    status=xp.where(failed, s.status, judged(size, s.x)),
                    live=claimed & ~met & (size < progress * s.confirmed) & (s.steps < maxiter),
                )

            after = s._replace(
                x=end.x,
                r=end.x,  # no residual is needed unless a check computes one; the old one would take memory in JAX
                residual_norm=xp.where(s.live, end.residual_norm, s.residual_norm),
                steps=end.steps,
                status=xp.where(s.live, end.status, s.status),
                norm_A=xp.where(s.live, end.norm_A, s.norm_A),
                live=xp.zeros_like(s.live),
            )
            return space.cond(s.live & ~trusted, check, after)

        if x0 is None:
            x, r, size = space.zeros(shared=True), b, rhs_norm
        else:
            x = space.where(rhs_norm > 0, x0, space.zeros())
            r = space.where(rhs_norm > 0, A.residual(b, x), b)
            size = space.norm(r)
        steps, status = xp.zeros_like(size, dtype=xp.int32), judged(size, x)
        live = (status == int(Status.MAXITER)) & (maxiter > 0)
        s = _State(x, r, size, size, steps, status, norm_A=xp.zeros_like(size), live=live)
        s = space.while_loop(lambda s: s.live, sweep, s, rounds)

        return s.x, SolverInfo(s.steps, s.residual_norm, rhs_norm, s.status)

    return scale_free(solve, b, x0, space)
