"""BiCGStab, for operators that are not symmetric."""

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import with_auto_damping
from bilevel.linear_solvers.cg import CG
from bilevel.linear_solvers.linear_solver import STEADY
from bilevel.linear_solvers.restarts import Cycle, Iterative, reach, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator
from bilevel.preconditioners.function import set_preconditioner
from bilevel.preconditioners.preconditioner import Preconditioner, applied, init
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V

RESTARTS = 10


class _State(NamedTuple, Generic[V]):
    x: V
    r: V
    p: V  # search direction
    v: V  # A p
    rho: Array  # shadow·r
    alpha: Array
    omega: Array
    best: V  # the x with the smallest residual
    least: Array
    norm_A: Array  # the largest norm(A p) / norm(p) so far
    steps: Array
    status: Array
    live: Array


@dataclass(frozen=True)
class BiCGStab(Iterative[object]):
    """Solve (A + damping I) v = b by stabilised biconjugate gradients (van der Vorst 1992), for any square A.

    It stores eight vectors; GMRES stores one per step. The residuals are not monotone, so the solver returns the best
    iterate. If a scalar vanishes, it restarts from the true residual of the best iterate. The stop rule is as in `CG`.
    Iterates that do not solve the system and are longer than ‖r‖ / (‖A‖ √eps) do not count, so v stays bounded on a
    singular A.

    ``info.steps`` counts iterations, of two products each. The warm start and each check take one more product.
    ``damping="auto"`` needs a symmetric A. `CG` solves first and finds the damping.

    Args:
        maxiter, rtol, atol, damping: as in `CG`.
        preconditioner: as in `GMRES`. A step takes two products with it.
    """

    requires: ClassVar[frozenset[str]] = frozenset({STEADY})

    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        set_preconditioner(self)

    @override
    def finder(self) -> CG:
        return CG(maxiter=self.maxiter, rtol=self.rtol, atol=self.atol)

    @override
    def init(self, A: LinearOperator[V]) -> object:
        """Return the state of the preconditioner."""
        return init(self.preconditioner, A)

    @override
    @with_auto_damping
    def solve(self, state: object, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.fixed_damping)
        space = A.space
        xp, eps = space.xp, space.eps
        precondition = applied(self.preconditioner, state, self.fixed_damping, space)

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array, norm_A: Array) -> Cycle[V]:
            origin = x
            shadow, start = r, space.dot(r, r)
            shadow_norm = xp.sqrt(start)

            def step(s: _State[V]) -> _State[V]:
                rho = space.dot(shadow, s.r)
                beta = (rho / s.rho) * (s.alpha / s.omega)
                p = space.axpy(beta, space.axpy(-s.omega, s.v, s.p), s.r)
                Mp = precondition(p)
                v = A(Mp)
                shadow_v, vv = space.dot(shadow, v), space.dot(v, v)
                alpha = rho / shadow_v
                half = space.axpy(-alpha, v, s.r)
                Mhalf = precondition(half)
                t = A(Mhalf)
                tt = space.dot(t, t)
                omega = xp.where(tt > 0, space.dot(t, half) / xp.where(tt > 0, tt, 1.0), 0.0)
                x = space.axpy(omega, Mhalf, space.axpy(alpha, Mp, s.x))
                r = space.axpy(-omega, t, half)
                rr = space.dot(r, r)
                size = xp.sqrt(rr)
                # If the cosine is rounding noise, so is the step, and later quantities may overflow.
                sound = xp.abs(shadow_v) > eps * shadow_norm * xp.sqrt(vv)
                finite = xp.isfinite(vv) & (xp.isfinite(tt) | ~sound)
                sound = sound & (size * eps < shadow_norm)
                norm_A = xp.maximum(s.norm_A, xp.sqrt(vv) / space.norm(Mp))
                far, near = reach(shadow_norm, norm_A, tolerance, space)
                distance = space.norm(space.subtract(x, origin))
                sound = sound & ~(distance > far)
                ok = s.live & finite & sound
                done, spent = size <= A.tolerance(tolerance, x), s.steps + 1 >= self.maxiter
                better = ok & (size < s.least) & (done | (distance <= near))
                lost = (omega == 0) | (xp.abs(space.dot(shadow, r)) <= eps * shadow_norm * size)
                # After a breakdown, the check by a product decides the status.
                status = xp.where(ok & ~lost & ~done & spent, int(Status.MAXITER), s.status)
                status = xp.where(finite, status, int(Status.NON_FINITE))
                return _State(
                    x=space.where(ok, x, s.x),
                    r=space.where(ok, r, s.r),
                    p=space.where(ok, p, s.p),
                    v=space.where(ok, v, s.v),
                    rho=xp.where(ok, rho, s.rho),
                    alpha=xp.where(ok, alpha, s.alpha),
                    omega=xp.where(ok, omega, s.omega),
                    best=space.where(better, x, s.best),
                    least=xp.where(better, size, s.least),
                    norm_A=xp.where(s.live & finite, norm_A, s.norm_A),
                    steps=xp.where(s.live, s.steps + 1, s.steps),
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~lost & ~done & ~spent,
                )

            one, zeros, status = xp.ones_like(start), space.zeros(), xp.full_like(steps, int(Status.CONVERGED))
            s = _State(x, r, zeros, zeros, one, one, one, x, shadow_norm, norm_A, steps, status, live)
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            return Cycle(s.best, s.least, s.steps, s.status, s.norm_A)

        return solve_with_restarts(
            cycle, A, b, x0, maxiter=self.maxiter, rtol=self.rtol, atol=self.atol, rounds=RESTARTS
        )
