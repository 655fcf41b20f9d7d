"""Conjugate gradients that check their own answer."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bilevel.linear_solvers.restarts import Iterative, Sweep, iterate
from bilevel.operators.combinators import copy, damped, norm, residual, scale_free
from bilevel.preconditioners.preconditioners import Preconditioner, check_preconditioner
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status


class _State(NamedTuple):
    x: Tree
    r: Tree  # residual, by its recurrence
    p: Tree  # search direction
    rr: Any  # r·r
    rz: Any  # r·z, where z is the preconditioned residual
    pp: Any  # p·p
    largest: Any  # largest |p·Ap / p·p| so far, a lower bound of the norm of A
    steps: Any
    status: Any
    live: Any


@dataclass(frozen=True)
class CG(Iterative):
    """Solve (H + damping I) v = b by conjugate gradients (Hestenes & Stiefel 1952).

    Stops once ``norm(b - A v) <= max(rtol * norm(b), atol)``, SciPy's rule, and only says ``CONVERGED`` once a product
    has confirmed it. Residuals are those of the dtype's own arithmetic: an ``rtol`` below its epsilon asks for no more
    than that.

    Where a direction has no positive curvature (to rounding), the solve stops at the iterate before it with
    ``NEGATIVE_CURVATURE``. If that is the very first direction, there is none: without a warm start v is then
    the right-hand side over its own absolute curvature, as in truncated Newton methods (Dembo & Steihaug 1983).

    ``info.steps`` counts iterations, a product each; the warm start and each check take one more.

    Args:
        maxiter: most iterations, >= 0.
        rtol: relative tolerance on the residual.
        atol: absolute tolerance on the residual.
        damping: added to the Hessian; shifts its spectrum into the positive.
        preconditioner: a `Preconditioner`, or None. What it takes to prepare one comes on top of ``info.steps``;
            `bl.prepare` does it once for several calls.
    """

    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self)

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Return what the preconditioner finds out, for `bl.prepare`."""
        return {"preconditioner": self.preconditioner.prepare(operator, like, space)} if self.preconditioner else {}

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        xp, eps = space.xp, space.eps(rhs)
        A = damped(operator, self.damping, space)
        M = self.preconditioner
        if M is not None:
            M = replace(M, **M.prepare(operator, rhs, space))  # pyright: ignore[reportArgumentType]

        def precondition(r: Tree, rr: Any) -> tuple[Tree, Any]:
            """Return z and r·z."""
            if M is None:
                return r, rr
            z = M.apply(r, self.damping, space)
            return z, space.dot(r, z)

        def sweep(x: Tree, r: Tree, steps: Any, live: Any, tolerance: Any) -> Sweep:
            start = space.dot(r, r)
            z, rz = precondition(r, start)

            def step(s: _State) -> _State:
                Ap = A(s.p)
                curvature = space.dot(s.p, Ap) / s.pp
                largest = xp.maximum(s.largest, xp.abs(curvature))
                alpha = s.rz / (s.pp * curvature)
                finite = xp.isfinite(curvature)
                # Relative to the largest curvature met, so free of scale: on a null direction it is rounding noise of
                # either sign. Comparisons with nan are false.
                positive = curvature > eps * largest
                # 0 * nan is nan: a zero alpha would not protect r.
                r = space.update(s.live & positive & finite, -alpha, Ap, s.r)
                rr = space.dot(r, r)
                positive = positive & xp.isfinite(rr)
                ok = s.live & positive & finite
                x = space.update(ok, alpha, s.p, s.x)
                rr = xp.where(ok, rr, s.rr)
                z, rz = precondition(r, rr)
                beta = rz / s.rz
                p = space.update(ok, 1, z, s.p, beta)
                done = xp.sqrt(rr) <= tolerance
                status = xp.where(done, int(Status.CONVERGED), s.status)
                status = xp.where(positive, status, int(Status.NEGATIVE_CURVATURE))
                status = xp.where(finite & xp.isfinite(rz), status, int(Status.NON_FINITE))
                pp = rr + beta**2 * s.pp if M is None else space.dot(p, p)  # r is orthogonal to the old p, z is not
                return _State(
                    x=x,
                    r=r,
                    p=p,
                    rr=rr,
                    rz=xp.where(ok, rz, s.rz),
                    pp=xp.where(ok, pp, s.pp),
                    largest=xp.where(s.live, largest, s.largest),
                    steps=s.steps + s.live,
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~done & (rz > 0) & (s.steps + 1 < self.maxiter),
                )

            # A preconditioner may be nan where no product is: its own were taken before.
            running = xp.where(xp.isfinite(rz), xp.full_like(steps, int(Status.MAXITER)), int(Status.NON_FINITE))
            pp = start if M is None else space.dot(z, z)
            work = (copy(x, space), copy(r, space), copy(z, space))
            s = _State(*work, start, rz, pp, xp.zeros_like(start), steps, running, live & (rz > 0))
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            return Sweep(s.x, xp.sqrt(s.rr), s.steps, s.status)

        def solve(b: Tree, x0: Tree | None, scale: Any) -> tuple[Tree, SolverInfo]:
            def stand_in(answer: tuple[Tree, SolverInfo]) -> tuple[Tree, SolverInfo]:
                """Without an iterate to stand on: the scaled right-hand side, never a quiet zero."""
                curvature = xp.abs(space.dot(b, A(b)) / space.dot(b, b))
                x = space.scale(1.0 / xp.where(curvature > 0, curvature, 1.0), b)
                return x, answer[1]._replace(residual_norm=norm(residual(A, b, x, space), space))

            answer = iterate(sweep, A, b, x0, space, rtol=self.rtol, atol=self.atol / scale, maxiter=self.maxiter)
            at_once = (answer[1].status == int(Status.NEGATIVE_CURVATURE)) & (answer[1].steps == 1)
            return answer if x0 is not None else space.cond(at_once, stand_in, answer)

        return scale_free(solve, rhs, x0, space)
