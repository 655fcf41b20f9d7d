"""Around an iterative method: warm start, stop rule, and a residual that a product has confirmed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from bilevel.operators.combinators import norm, residual
from bilevel.options import check_int, check_real
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status

ROUNDS = 4  # restarts from the true residual; the second already reaches what the dtype can
DRIFT = 50  # steps for which a solve that ran out of them has its own residual taken at its word


@dataclass(frozen=True)
class Iterative:
    """The options that the iterative solvers share."""

    remedy: ClassVar[str] = "Raise maxiter, loosen rtol, or add damping."

    maxiter: int = 200
    rtol: float = 1e-5
    atol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "maxiter", least=0)
        for option in ("rtol", "atol", "damping"):
            check_real(self, option, least=0)


class Sweep(NamedTuple):
    """Where a method came from a start: its own word, before it is checked."""

    x: Tree
    norm: Any  # of the residual
    steps: Any  # in all
    status: Any


class _State(NamedTuple):
    start: Tree  # of the sweep
    x: Tree
    r: Tree
    norm: Any
    confirmed: Any  # norm of the last residual that a product has confirmed
    steps: Any
    status: Any
    live: Any


def iterate(
    sweep: Callable[[Tree, Tree, Any, Any, Any], Sweep],
    operator: Operator,
    rhs: Tree,
    x0: Tree | None,
    space: VectorSpace,
    *,
    rtol: Any,
    atol: Any,
    maxiter: int,
    rounds: int = ROUNDS,
    progress: float = 0.5,
) -> tuple[Tree, SolverInfo]:
    """Solve A x = b by sweeps of a method until ``norm(b - A x) <= max(rtol * norm(b), atol)``.

    The recurrences for a residual drift from the truth in floating point. So a sweep that says it has converged is
    checked by a product, and if it has not, the next one starts from the true residual as long as that helps. One that
    made worse what it says it made better is taken back.

    Args:
        sweep: (x, r, steps, live, tolerance) -> `Sweep`, from x with the residual r; with ``live`` false it must do
            nothing. Ends with ``CONVERGED`` below the tolerance, else ``MAXITER`` at ``maxiter`` steps in all,
            or what went wrong.
        operator: A.
        rhs: b.
        x0: a warm start, at one product; ignored for b = 0, whose solution is zero.
        space: the vectors.
        rtol: relative tolerance.
        atol: absolute tolerance.
        maxiter: most steps.
        rounds: most sweeps.
        progress: go on while a sweep leaves less than this share of the residual.
    """
    xp = space.xp
    rhs_norm = norm(rhs, space)
    # Below the dtype's epsilon there is nothing to ask for.
    tolerance = xp.maximum(xp.maximum(rtol * rhs_norm, space.eps(rhs) * rhs_norm), atol * xp.ones_like(rhs_norm))

    def check(s: _State) -> _State:
        r = residual(operator, rhs, s.x, space)
        size = norm(r, space)
        claimed, met = s.status == int(Status.CONVERGED), size <= tolerance
        undecided = claimed | (s.status == int(Status.MAXITER))
        status = xp.where(met, int(Status.CONVERGED), xp.full_like(s.status, int(Status.MAXITER)))
        status = xp.where(xp.isfinite(size), status, int(Status.NON_FINITE))
        # Residuals may well grow (those of CG do on the way), but not if the recurrence has it otherwise.
        worse = (size > s.confirmed) & (s.norm <= s.confirmed)
        return s._replace(
            x=space.select(worse, s.start, s.x),
            r=r,
            norm=xp.where(worse, s.confirmed, size),
            confirmed=size,
            status=xp.where(undecided, status, s.status),
            live=claimed & ~met & (size < progress * s.confirmed) & (s.steps < maxiter),
        )

    def round_(s: _State) -> _State:
        swept = sweep(s.x, s.r, s.steps, s.live, tolerance)
        short = (swept.status == int(Status.MAXITER)) & (swept.steps == maxiter) & (swept.steps <= DRIFT)
        doubtful = s.live & ~short
        s = s._replace(
            start=s.x,
            x=swept.x,
            norm=xp.where(s.live, swept.norm, s.norm),
            steps=swept.steps,
            status=xp.where(s.live, swept.status, s.status),
            live=s.live & False,
        )
        return space.cond(doubtful, check, s)

    if x0 is None:
        x, r = space.zeros_like(rhs), rhs
    else:
        x = space.select(rhs_norm > 0, x0, space.zeros_like(rhs))
        r = space.select(rhs_norm > 0, residual(operator, rhs, x, space), rhs)
    size = norm(r, space)
    met, finite = size <= tolerance, xp.isfinite(size)
    steps = xp.zeros_like(size, dtype=xp.int32)
    status = xp.where(met, int(Status.CONVERGED), xp.full_like(steps, int(Status.MAXITER)))
    s = _State(
        start=x,
        x=x,
        r=r,
        norm=size,
        confirmed=size,
        steps=steps,
        status=xp.where(finite, status, int(Status.NON_FINITE)),
        live=~met & finite & (maxiter > 0),
    )
    s = space.while_loop(lambda s: s.live, round_, s, rounds)

    def spoil(s: _State) -> _State:
        """Return nan: loud under jit too, where only the status could tell."""
        return s._replace(x=space.scale(float("nan"), rhs), norm=s.norm + float("nan"))

    s = space.cond(s.status == int(Status.NON_FINITE), spoil, s)
    return s.x, SolverInfo(s.steps, s.norm, rhs_norm, s.status)
