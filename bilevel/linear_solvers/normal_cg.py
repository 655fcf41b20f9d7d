"""Conjugate gradients on the normal equations, for operators that are not symmetric, and for singular systems."""

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import STEADY, TRANSPOSED
from bilevel.linear_solvers.restarts import Cycle, Iterative, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V


class _State(NamedTuple, Generic[V]):
    x: V
    r: V  # residual, by its recurrence
    p: V  # search direction
    gamma: Array  # s·s, where s = Aᵀ r
    norm_A: Array  # the largest norm(A p) / norm(p) so far
    steps: Array
    status: Array
    live: Array


@dataclass(frozen=True)
class NormalCG(Iterative[None]):
    """Solve AᵀA v = Aᵀ b with A = (operator + damping I), by conjugate gradients (CGLS: Hestenes & Stiefel 1952).

    A can be any square operator with a known transpose: a Hessian, or a fixed point or root on torch or JAX. A step
    reduces norm(b - A v), for indefinite A too. On a singular system without a solution, v is the least-squares
    solution of least norm, with the status ``MAXITER``. The number of steps grows with the condition number of A, not
    with its root as in `CG`. So it is most useful where the singular values are in few clusters, where GMRES stagnates,
    or where the system is singular.

    The stop rule is as in `CG`. The solve also stops if Aᵀ (b - A v) is zero to rounding, since no v has a smaller
    residual then. ``info.steps`` counts iterations, of one product with A and one with Aᵀ each. A warm start and each
    check take one more product. With a warm start, the norm of v on a singular system is not the least.

    Args:
        maxiter, rtol, atol: as in `CG`.
        damping: a number, added to the diagonal of the operator. "auto" is not possible.
    """

    requires: ClassVar[frozenset[str]] = frozenset({STEADY, TRANSPOSED})
    stagnation_remedy: ClassVar[str] = (
        "If the system has a solution, loosen rtol or add damping. If params is not float64, use float64."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(self, "damping")

    @override
    def solve(self, state: None, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.fixed_damping)
        transposed = A.transposed()
        space = A.space
        xp, eps = space.xp, space.eps

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array, norm_A: Array) -> Cycle[V]:
            s = transposed(r)
            gamma = space.dot(s, s)

            def step(c: _State[V]) -> _State[V]:
                q = A(c.p)
                qq, pp = space.dot(q, q), space.dot(c.p, c.p)
                norm_A = xp.maximum(c.norm_A, xp.sqrt(qq / pp))
                # On a direction that A maps to zero, to rounding, a step would be arbitrarily long.
                sound = qq > (eps * norm_A) ** 2 * pp
                alpha = c.gamma / xp.where(sound, qq, 1.0)
                ok = c.live & sound & xp.isfinite(qq)
                x = space.axpby_where(ok, alpha, c.p, c.x)
                r = space.axpby_where(ok, -alpha, q, c.r)
                s = transposed(r)
                gamma = space.dot(s, s)
                finite = xp.isfinite(qq) & xp.isfinite(gamma)
                size = space.norm(r)
                # Either the system is solved, or no v has a smaller residual. A product tells which.
                done = (size <= A.tolerance(tolerance, x)) | (xp.sqrt(gamma) <= eps * norm_A * size)
                spent = c.steps + 1 >= self.maxiter
                status = xp.where(ok & ~done & spent, int(Status.MAXITER), c.status)
                status = xp.where(finite, status, int(Status.NON_FINITE))
                return _State(
                    x=x,
                    r=r,
                    p=space.axpby_where(ok, 1, s, c.p, gamma / c.gamma),
                    gamma=xp.where(ok, gamma, c.gamma),
                    norm_A=xp.where(c.live & finite, norm_A, c.norm_A),
                    steps=xp.where(c.live, c.steps + 1, c.steps),
                    status=xp.where(c.live, status, c.status),
                    live=ok & finite & ~done & ~spent,
                )

            status = xp.full_like(steps, int(Status.CONVERGED))
            status = xp.where(xp.isfinite(gamma), status, int(Status.NON_FINITE))
            start = _State(
                space.copy(x), space.copy(r), space.copy(s), gamma, norm_A, steps, status, live & (gamma > 0)
            )
            c = space.while_loop(lambda c: c.live, step, start, self.maxiter)
            return Cycle(c.x, space.norm(c.r), c.steps, c.status, c.norm_A)

        return solve_with_restarts(cycle, A, b, x0, maxiter=self.maxiter, rtol=self.rtol, atol=self.atol)
