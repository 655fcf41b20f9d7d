"""BiCGStab: for operators that are not symmetric, in a fixed number of vectors."""

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import STEADY
from bilevel.linear_solvers.restarts import Cycle, Iterative, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator
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
    best: V  # the x of the least residual: they go up and down
    least: Array
    steps: Array
    status: Array
    live: Array


@dataclass(frozen=True)
class BiCGStab(Iterative[None]):
    """Solve (A + damping I) v = b by stabilised biconjugate gradients (van der Vorst 1992), for any square A.

    Needs eight vectors whatever the number of steps, where GMRES stores one per step. Its residuals are not monotone,
    and it can break down where a scalar vanishes: then it starts again from the true residual of the best iterate so
    far, which is also what it returns. Stops by SciPy's rule and confirms by a product, as `CG`.

    ``info.steps`` counts iterations, two products each; the warm start and each check take one more.

    Args:
        maxiter: most iterations, >= 0.
        rtol: relative tolerance on the residual.
        atol: absolute tolerance on the residual.
        damping: added to the operator.
    """

    requires: ClassVar[frozenset[str]] = frozenset({STEADY})

    @override
    def solve(self, state: None, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.damping)
        space = A.space
        xp, eps = space.xp, space.eps

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array) -> Cycle[V]:
            shadow, start = r, space.dot(r, r)
            shadow_norm = xp.sqrt(start)

            def step(s: _State[V]) -> _State[V]:
                rho = space.dot(shadow, s.r)
                beta = (rho / s.rho) * (s.alpha / s.omega)
                p = space.axpy(beta, space.axpy(-s.omega, s.v, s.p), s.r)
                v = A(p)
                shadow_v, vv = space.dot(shadow, v), space.dot(v, v)
                alpha = rho / shadow_v
                half = space.axpy(-alpha, v, s.r)
                t = A(half)
                tt = space.dot(t, t)
                omega = xp.where(tt > 0, space.dot(t, half) / xp.where(tt > 0, tt, 1.0), 0.0)
                x = space.axpy(omega, half, space.axpy(alpha, p, s.x))
                r = space.axpy(-omega, t, half)
                rr = space.dot(r, r)
                size = xp.sqrt(rr)
                # A cosine that is rounding noise gives a step that is, and what follows from it may overflow.
                sound = xp.abs(shadow_v) > eps * shadow_norm * xp.sqrt(vv)
                finite = xp.isfinite(vv) & (xp.isfinite(tt) | ~sound)
                sound = sound & (size * eps < shadow_norm)
                ok = s.live & finite & sound
                better = ok & (size < s.least)
                done, spent = size <= tolerance, s.steps + 1 >= self.maxiter
                lost = (omega == 0) | (xp.abs(space.dot(shadow, r)) <= eps * shadow_norm * size)
                # After a breakdown it is the product behind a sweep that decides.
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
                    steps=xp.where(s.live, s.steps + 1, s.steps),
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~lost & ~done & ~spent,
                )

            one, zeros = xp.ones_like(start), space.zeros()
            s = _State(
                x=x,
                r=r,
                p=zeros,
                v=zeros,
                rho=one,
                alpha=one,
                omega=one,
                best=x,
                least=shadow_norm,
                steps=steps,
                status=xp.full_like(steps, int(Status.CONVERGED)),
                live=live,
            )
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            return Cycle(s.best, s.least, s.steps, s.status)

        return solve_with_restarts(
            cycle, A, b, x0, maxiter=self.maxiter, rtol=self.rtol, atol=self.atol, rounds=RESTARTS
        )
