"""BiCGStab: for operators that are not symmetric, in a fixed number of vectors."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from bilevel.linear_solvers.restarts import Iterative, Sweep, iterate
from bilevel.operators.combinators import damped, scale_free
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status

RESTARTS = 10


class _State(NamedTuple):
    x: Tree
    r: Tree
    p: Tree  # search direction
    v: Tree  # A p
    rho: Any  # shadow·r
    alpha: Any
    omega: Any
    best: Tree  # the x of the least residual: they go up and down
    least: Any
    steps: Any
    status: Any
    live: Any


@dataclass(frozen=True)
class BiCGStab(Iterative):
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

    nonsymmetric: ClassVar[bool] = True

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        xp, eps = space.xp, space.eps(rhs)
        A = damped(operator, self.damping, space)

        def sweep(x: Tree, r: Tree, steps: Any, live: Any, tolerance: Any) -> Sweep:
            shadow, start = r, space.dot(r, r)
            shadow_norm = xp.sqrt(start)

            def step(s: _State) -> _State:
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
                    x=space.select(ok, x, s.x),
                    r=space.select(ok, r, s.r),
                    p=space.select(ok, p, s.p),
                    v=space.select(ok, v, s.v),
                    rho=xp.where(ok, rho, s.rho),
                    alpha=xp.where(ok, alpha, s.alpha),
                    omega=xp.where(ok, omega, s.omega),
                    best=space.select(better, x, s.best),
                    least=xp.where(better, size, s.least),
                    steps=s.steps + s.live,
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~lost & ~done & ~spent,
                )

            one, zeros = xp.ones_like(start), space.zeros_like(r)
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
            return Sweep(s.best, s.least, s.steps, s.status)

        def solve(b: Tree, x0: Tree | None, scale: Any) -> tuple[Tree, SolverInfo]:
            return iterate(
                sweep,
                A,
                b,
                x0,
                space,
                rtol=self.rtol,
                atol=self.atol / scale,
                maxiter=self.maxiter,
                rounds=RESTARTS,
            )

        return scale_free(solve, rhs, x0, space)
