"""Conjugate gradients that check their own answer."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status
from bilevel.solvers.operators import damped, norm, residual
from bilevel.solvers.options import check_int, check_real

ROUNDS = 4  # restarts from the true residual; the second already reaches what the dtype can
DRIFT = 50  # steps for which a solve that claims nothing takes the residual of the recurrence at its word
GROWTH = 1e3  # of the residual; a definite operator stays far below, a singular one runs away


class _State(NamedTuple):
    x: Tree
    r: Tree  # residual, by its recurrence
    p: Tree  # search direction
    rr: Any  # r·r
    pp: Any  # p·p
    largest: Any  # largest |p·Ap / p·p| so far, a lower bound of the norm of A
    start: Any  # r·r at the start
    checked: Any  # norm of the last residual that a product has confirmed
    steps: Any
    status: Any
    live: Any


@dataclass(frozen=True)
class CG:
    """Solve (H + damping I) v = b by conjugate gradients (Hestenes & Stiefel 1952).

    Stops once ``norm(b - A v) <= max(rtol * norm(b), atol)``, SciPy's rule. The recurrence for the residual
    drifts from the truth in floating point, so ``CONVERGED`` is only reported after one more product has
    confirmed it; if it does not, the iteration restarts from the true residual as long as that helps. Residuals are
    those of the dtype's own arithmetic: an ``rtol`` below its epsilon asks for no more than that.

    Where a direction has no positive curvature (to rounding), the solve stops at the last good iterate with
    ``NEGATIVE_CURVATURE``. If that is the very first direction, there is none: without a warm start v is then
    the right-hand side over its own absolute curvature, as in truncated Newton methods (Dembo & Steihaug 1983).

    ``info.steps`` counts iterations, a product each; the warm start and each check take one more.

    Args:
        maxiter: most iterations, >= 0.
        rtol: relative tolerance on the residual.
        atol: absolute tolerance on the residual.
        damping: added to the Hessian; shifts its spectrum into the positive.
    """

    maxiter: int = 200
    rtol: float = 1e-5
    atol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "maxiter", least=0)
        for option in ("rtol", "atol", "damping"):
            check_real(self, option, least=0)

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        xp, eps = space.xp, space.eps(rhs)
        A = damped(operator, self.damping, space)
        rhs_norm = norm(rhs, space)
        tolerance = xp.maximum(self.rtol * rhs_norm, xp.full_like(rhs_norm, self.atol))

        def step(s: _State) -> _State:
            Ap = A(s.p)
            curvature = space.dot(s.p, Ap) / s.pp
            largest = xp.maximum(s.largest, xp.abs(curvature))
            alpha = s.rr / (s.pp * curvature)
            r = space.axpy(-alpha, Ap, s.r)
            rr = space.dot(r, r)
            finite = xp.isfinite(curvature)
            # Relative to the largest curvature met, so free of scale. On a null direction it is rounding noise of
            # either sign, and the residual runs away. Comparisons with nan are false.
            positive = (curvature > eps * largest) & (rr < GROWTH**2 * s.start)
            ok = s.live & positive & finite
            # 0 * nan is nan: a zero alpha would not protect x.
            x = space.select(ok, space.axpy(alpha, s.p, s.x), s.x)
            r = space.select(ok, r, s.r)
            rr = xp.where(ok, rr, s.rr)
            beta = rr / s.rr
            p = space.select(ok, space.axpy(beta, s.p, r), s.p)
            pp = xp.where(ok, rr + beta**2 * s.pp, s.pp)  # r is orthogonal to the old p
            done = xp.sqrt(rr) <= tolerance
            status = xp.where(done, int(Status.CONVERGED), s.status)
            status = xp.where(positive, status, int(Status.NEGATIVE_CURVATURE))
            status = xp.where(finite, status, int(Status.NON_FINITE))
            return _State(
                x=x,
                r=r,
                p=p,
                rr=rr,
                pp=pp,
                largest=xp.where(s.live, largest, s.largest),
                start=s.start,
                checked=s.checked,
                steps=s.steps + s.live,
                status=xp.where(s.live, status, s.status),
                live=ok & ~done & (s.steps + 1 < self.maxiter),
            )

        def check(s: _State) -> _State:
            r = residual(A, rhs, s.x, space)
            rr = space.dot(r, r)
            true_norm = xp.sqrt(rr)
            claimed, met = s.status == int(Status.CONVERGED), true_norm <= tolerance
            undecided = claimed | (s.status == int(Status.MAXITER))
            status = xp.where(met, int(Status.CONVERGED), xp.full_like(s.status, int(Status.MAXITER)))
            return s._replace(
                r=r,
                p=r,
                rr=rr,
                pp=rr,
                checked=true_norm,
                status=xp.where(undecided, status, s.status),
                live=claimed & ~met & (true_norm < 0.5 * s.checked) & (s.steps < self.maxiter),
            )

        def stand_in(s: _State) -> _State:
            """Without an iterate to stand on: nan, or the scaled right-hand side; never a quiet zero."""
            scale = 1.0 / xp.where(s.largest > 0, s.largest, 1.0)
            scale = xp.where(s.status == int(Status.NON_FINITE), float("nan"), scale)
            x = space.scale(scale, rhs)
            r = residual(A, rhs, x, space)
            return s._replace(x=x, rr=space.dot(r, r))

        def round_(s: _State) -> _State:
            entered = s.live
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            return space.cond(entered & ((s.status != int(Status.MAXITER)) | (s.steps > DRIFT)), check, s)

        if x0 is None:
            x, r = space.zeros_like(rhs), rhs
        else:
            x = space.select(rhs_norm > 0, x0, space.zeros_like(rhs))
            r = space.select(rhs_norm > 0, residual(A, rhs, x, space), rhs)
        rr = space.dot(r, r)
        met = xp.sqrt(rr) <= tolerance
        steps = xp.zeros_like(rr, dtype=xp.int32)
        status = xp.where(met, int(Status.CONVERGED), xp.full_like(steps, int(Status.MAXITER)))
        s = _State(
            x=x,
            r=r,
            p=r,
            rr=rr,
            pp=rr,
            largest=xp.zeros_like(rr),
            start=rr,
            checked=xp.sqrt(rr),
            steps=steps,
            status=xp.where(xp.isfinite(rr), status, int(Status.NON_FINITE)),
            live=~met & xp.isfinite(rr) & (self.maxiter > 0),
        )
        s = space.while_loop(lambda s: s.live, round_, s, ROUNDS)

        failed = s.status == int(Status.NON_FINITE)
        if x0 is None:
            failed = failed | (s.status == int(Status.NEGATIVE_CURVATURE)) & (s.steps == 1)
        s = space.cond(failed, stand_in, s)
        return s.x, SolverInfo(s.steps, xp.sqrt(s.rr), rhs_norm, s.status)
