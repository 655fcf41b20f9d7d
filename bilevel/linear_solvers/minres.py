"""MINRES, for symmetric operators that may be indefinite."""

from dataclasses import dataclass
from typing import Generic, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import with_auto_damping
from bilevel.linear_solvers.cg import CG
from bilevel.linear_solvers.restarts import Cycle, Iterative, reach, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V


class _State(NamedTuple, Generic[V]):
    x: V
    q_old: V  # Lanczos vectors
    q: V
    d_old: V  # search directions
    d: V
    beta: Array  # coupling of q_old and q
    cs_old: Array  # the last two Givens rotations
    sn_old: Array
    cs: Array
    sn: Array
    eta: Array  # the signed norm of the residual
    norm_A: Array  # largest entry of the tridiagonal matrix so far
    steps: Array
    status: Array
    live: Array


@dataclass(frozen=True)
class MINRES(Iterative[None]):
    """Solve (H + damping I) v = b by minimal residuals (Paige & Saunders 1975).

    For symmetric Hessians that may be indefinite, such as the Hessians of networks before the end of their training.
    The residual falls at each step, for eigenvalues of either sign. For a singular system without a solution, v is a
    least-squares solution, with ``MAXITER``. Rounding errors grow with the square of the condition number κ. So the
    solve also ends with ``MAXITER`` if κ exceeds 1/√eps (3e3 in float32). On definite systems, CG is more accurate.

    The stop rule and ``info.steps`` are as in `CG`. With ``damping="auto"``, `CG` solves first and finds the damping.

    Args:
        maxiter, rtol, atol, damping: as in `CG`.
    """

    @override
    def finder(self) -> CG:
        return CG(maxiter=self.maxiter, rtol=self.rtol, atol=self.atol)

    @override
    @with_auto_damping
    def solve(self, state: None, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.fixed_damping)
        space = A.space
        xp, eps = space.xp, space.eps

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array, norm_A: Array) -> Cycle[V]:
            origin, size = x, space.norm(r)

            def step(s: _State[V]) -> _State[V]:
                # Compute one more column of the Lanczos process.
                z = space.axpy(-s.beta, s.q_old, A(s.q))
                alpha = space.dot(s.q, z)
                z = space.axpy(-alpha, s.q, z)
                beta = space.norm(z)
                norm_A = xp.maximum(s.norm_A, xp.maximum(xp.abs(alpha), beta))
                # Apply the last two rotations, and a new rotation that eliminates beta.
                delta = s.cs * alpha - s.cs_old * s.sn * s.beta
                rho1 = xp.sqrt(delta**2 + beta**2)
                rho2 = s.sn * alpha + s.cs_old * s.cs * s.beta
                rho3 = s.sn_old * s.beta
                finite = xp.isfinite(rho1)
                # If norm(A r) / norm(r) vanishes, x is the least-squares solution of a singular system (Choi, Paige &
                # Saunders 2011).
                stationary = xp.sqrt(delta**2 + (s.cs * beta) ** 2) <= eps**0.5 * norm_A
                pivot = xp.where(rho1 > 0, rho1, 1.0)
                d = space.axpy(-rho3, s.d_old, space.axpy(-rho2, s.d, s.q))
                d = space.scale(1.0 / pivot, d)
                x = space.axpy(s.eta * delta / pivot, d, s.x)
                eta = -s.eta * beta / pivot
                done = xp.abs(eta) <= A.tolerance(tolerance, x)
                # The error of the residual is eps norm(A) norm(x), which grows as x grows in the null space.
                lost = ~done & (eps * norm_A * space.norm(x) > 0.2 * xp.abs(s.eta))
                distance = space.norm(space.subtract(x, origin))
                lost = lost | (~done & (distance > reach(size, norm_A, tolerance, space).far))
                ok = s.live & finite & ~stationary & ~lost
                cs = xp.where(ok, delta / pivot, s.cs)
                sn = xp.where(ok, beta / pivot, s.sn)
                exhausted = beta <= eps * norm_A
                status = xp.where(done & ok, int(Status.CONVERGED), s.status)
                status = xp.where(finite, status, int(Status.NON_FINITE))
                return _State(
                    x=space.where(ok, x, s.x),
                    q_old=space.where(ok, s.q, s.q_old),
                    q=space.where(ok, space.scale(1.0 / xp.where(exhausted, 1.0, beta), z), s.q),
                    d_old=space.where(ok, s.d, s.d_old),
                    d=space.where(ok, d, s.d),
                    beta=xp.where(ok, beta, s.beta),
                    cs_old=xp.where(ok, s.cs, s.cs_old),
                    sn_old=xp.where(ok, s.sn, s.sn_old),
                    cs=cs,
                    sn=sn,
                    eta=xp.where(ok, eta, s.eta),
                    norm_A=xp.where(ok, norm_A, s.norm_A),
                    steps=xp.where(s.live, s.steps + 1, s.steps),
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~done & ~exhausted & (s.steps + 1 < self.maxiter),
                )

            zero, one, none = xp.zeros_like(size), xp.ones_like(size), space.zeros()
            q, status = space.scale(1.0 / xp.where(live, size, 1.0), r), xp.full_like(steps, int(Status.MAXITER))
            s = _State(x, none, q, none, none, zero, one, zero, one, zero, size, norm_A, steps, status, live)
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            return Cycle(s.x, xp.abs(s.eta), s.steps, s.status, s.norm_A)

        return solve_with_restarts(cycle, A, b, x0, maxiter=self.maxiter, rtol=self.rtol, atol=self.atol)
