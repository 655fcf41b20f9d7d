"""Chebyshev's iteration, for those who know where the eigenvalues are."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import bilevel as bl
from bilevel.linear_solvers.restarts import Cycle, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator


class _State(NamedTuple):
    x: Any
    r: Any
    d: Any
    rho: Any
    norm: Any  # of r
    steps: Any
    live: Any


@dataclass(frozen=True)
class Chebyshev(bl.LinearSolver[None]):
    """Solve (H + damping I) v = b without an inner product: Saad, Iterative Methods (2003), algorithm 12.1.

    Args:
        smallest: lower bound of the eigenvalues of H + damping I, > 0.
        largest: upper bound, > smallest.
        maxiter: most steps.
        rtol: relative tolerance on the residual.
        damping: added to the Hessian.
    """

    smallest: float = 0.1
    largest: float = 10.0
    maxiter: int = 200
    rtol: float = 1e-6
    damping: float = 0.0

    def init(self, A: LinearOperator[Any]) -> None:
        return None

    def solve(self, state: None, A: LinearOperator[Any], b: Any, x0: Any) -> tuple[Any, bl.SolverInfo]:
        A = A.damped(self.damping)
        space, xp = A.space, A.space.xp
        center, radius = (self.largest + self.smallest) / 2, (self.largest - self.smallest) / 2

        def cycle(x: Any, r: Any, steps: Any, live: Any, tolerance: Any, norm_A: Any) -> Cycle[Any]:
            start = space.norm(r)

            def step(s: _State) -> _State:
                r = space.subtract(s.r, A(s.d))
                rho = 1 / (2 * center / radius - s.rho)
                d = space.axpy(rho * s.rho, s.d, space.scale(2 * rho / radius, r))
                norm = space.norm(r)
                go_on = (norm > tolerance) & (norm <= 1e3 * start) & (s.steps + 1 < self.maxiter)
                new = _State(space.axpy(1.0, s.d, s.x), r, d, rho, norm, s.steps + 1, s.live & go_on)
                return space.where(s.live, new, s)

            rho = radius / center * xp.ones_like(start)
            s = _State(x, r, space.scale(1 / center, r), rho, start, steps, live)
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            status = xp.where(
                s.norm <= tolerance, int(bl.Status.CONVERGED), xp.full_like(steps, int(bl.Status.MAXITER))
            )
            status = xp.where(s.norm > 1e3 * start, int(bl.Status.DIVERGED), status)
            status = xp.where(xp.isfinite(s.norm), status, int(bl.Status.NON_FINITE))
            return Cycle(s.x, s.norm, s.steps, status, norm_A)

        return solve_with_restarts(cycle, A, b, x0, maxiter=self.maxiter, rtol=self.rtol)
