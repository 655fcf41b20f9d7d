"""Chebyshev's iteration, for those who know where the eigenvalues are."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import bilevel as bl
from bilevel import Status
from bilevel.operators.combinators import damped, norm, residual, scale_free


class _State(NamedTuple):
    x: Any
    r: Any
    d: Any
    rho: Any
    steps: Any
    live: Any


@dataclass(frozen=True)
class Chebyshev:
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

    def solve(self, operator: Any, rhs: Any, x0: Any, space: Any) -> Any:
        A = damped(operator, self.damping, space)
        return scale_free(lambda b, x0, scale: self._iterate(A, b, x0, space), rhs, x0, space)

    def _iterate(self, A: Any, b: Any, x0: Any, space: Any) -> Any:
        xp, size = space.xp, norm(b, space)
        center, radius = (self.largest + self.smallest) / 2, (self.largest - self.smallest) / 2
        tolerance = xp.maximum(self.rtol * size, space.eps(b) * size)
        if x0 is None:
            x, r = space.zeros_like(b), b
        else:
            x = space.select(size > 0, x0, space.zeros_like(b))
            r = residual(A, b, x, space)
        start = norm(r, space)

        def step(s: _State) -> _State:
            r = space.axpy(-1.0, A(s.d), s.r)
            rho = 1 / (2 * center / radius - s.rho)
            d = space.axpy(rho * s.rho, s.d, space.scale(2 * rho / radius, r))
            left = norm(r, space)
            go_on = (left > tolerance) & (left <= 1e3 * start) & (s.steps + 1 < self.maxiter)
            ok = s.live & xp.isfinite(left)
            return _State(
                x=space.select(s.live, space.axpy(1.0, s.d, s.x), s.x),
                r=space.select(s.live, r, s.r),
                d=space.select(ok, d, s.d),
                rho=xp.where(ok, rho, s.rho),
                steps=s.steps + s.live,
                live=ok & go_on,
            )

        steps = xp.zeros_like(size, dtype=xp.int32)
        live = (start > tolerance) & xp.isfinite(start) & (self.maxiter > 0)
        rho = radius / center * xp.ones_like(size)
        s = _State(x, r, space.scale(1 / center, r), rho, steps, live)
        s = space.while_loop(lambda s: s.live, step, s, self.maxiter)

        left = norm(residual(A, b, s.x, space), space)
        finite = xp.isfinite(left) & xp.isfinite(norm(s.r, space))
        status = xp.where(left <= tolerance, int(Status.CONVERGED), xp.full_like(steps, int(Status.MAXITER)))
        status = xp.where(left > 1e2 * start, int(Status.DIVERGED), status)
        status = xp.where(finite, status, int(Status.NON_FINITE))
        x = space.scale(xp.where(finite, 1.0, float("nan")), s.x)
        return x, bl.SolverInfo(s.steps, left, size, status)
