"""The truncated Neumann series of Lorraine, Vicol & Duvenaud."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status
from bilevel.solvers.lanczos import spectrum
from bilevel.solvers.operators import damped, norm, residual, scale_free
from bilevel.solvers.options import check_int, check_real


class _State(NamedTuple):
    total: Tree
    term: Tree
    norm: Any  # of the term
    least: Any  # of the norms so far
    steps: Any
    status: Any
    live: Any


def check_step_size(solver: Any) -> None:
    """Raise unless ``step_size`` is a positive number or "auto"."""
    if isinstance(solver.step_size, str):
        if solver.step_size != "auto":
            raise ValueError(
                f'{type(solver).__name__}.step_size: expected a number > 0 or "auto", got {solver.step_size!r}.'
            )
    else:
        check_real(solver, "step_size", above=0)


def safe_step(operator: Operator, like: Tree, space: VectorSpace) -> Any:
    """Return 1 / (largest |eigenvalue| + its error bound), by Lanczos; 1 for the zero operator."""
    xp = space.xp
    ends = spectrum(operator, like, space)
    bound = xp.maximum(xp.abs(ends.smallest), xp.abs(ends.largest)) + ends.error
    return 1.0 / xp.where(bound == 0, 1.0, bound)


@dataclass(frozen=True)
class Neumann:
    """v = α Σ_{j=0}^{terms} (I − α(H + damping I))^j b, by ``terms`` Hessian-vector products.

    Algorithm 3 of Lorraine, Vicol & Duvenaud (AISTATS 2020), with the final factor α that its first
    version lacks. Converges to (H + damping I)^{-1} b where H + damping I is positive definite and
    α < 2/λmax. For a symmetric operator the norms of the terms are log-convex in j: once one has grown they
    all will, so the first growth stops the series with ``DIVERGED``, at the last sum before it.

    ``info.residual_norm`` is the norm of the last term: the residual of the sum one term earlier, which bounds
    that of v while the series converges.

    With a warm start v0 the series corrects it: v0 + α Σ (I − αA)^j (b − A v0), at one more product.

    Args:
        terms: products, >= 0; with 0, v = α b.
        step_size: α > 0. "auto": 1/(λmax + its error bound), from 12 Lanczos products more per call.
        damping: added to the Hessian.
    """

    terms: int = 20
    step_size: float | Literal["auto"] = "auto"
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "terms", least=0)
        check_step_size(self)
        check_real(self, "damping", least=0)

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        A = damped(operator, self.damping, space)
        alpha = safe_step(A, rhs, space) if isinstance(self.step_size, str) else self.step_size
        return scale_free(lambda b, x0, scale: self._series(A, b, x0, alpha, space), rhs, x0, space)

    def _series(
        self, A: Operator, rhs: Tree, x0: Tree | None, alpha: Any, space: VectorSpace
    ) -> tuple[Tree, SolverInfo]:
        xp = space.xp
        rhs_norm = norm(rhs, space)
        growth = 1 + 16 * space.eps(rhs)  # more than rounding can do to a term that stays

        def step(s: _State) -> _State:
            term = space.axpy(-alpha, A(s.term), s.term)
            size = norm(term, space)
            finite, grown = xp.isfinite(size), size > growth * s.least
            ok = s.live & finite & ~grown
            status = xp.where(grown, int(Status.DIVERGED), s.status)
            status = xp.where(finite, status, int(Status.NON_FINITE))
            return _State(
                total=space.select(ok, space.axpy(1.0, term, s.total), s.total),
                term=space.select(ok, term, s.term),
                norm=xp.where(ok, size, s.norm),
                least=xp.where(ok, xp.minimum(size, s.least), s.least),
                steps=s.steps + s.live,
                status=xp.where(s.live, status, s.status),
                live=ok,
            )

        if x0 is None:
            start = rhs
        else:
            x0 = space.select(rhs_norm > 0, x0, space.zeros_like(rhs))
            start = residual(A, rhs, x0, space)
        size = norm(start, space)
        finite = xp.isfinite(size) & xp.isfinite(size * alpha)
        steps = xp.zeros_like(size, dtype=xp.int32)
        s = _State(
            total=start,
            term=start,
            norm=size,
            least=size,
            steps=steps,
            status=xp.where(finite, xp.full_like(steps, int(Status.CONVERGED)), int(Status.NON_FINITE)),
            live=finite,
        )
        s = space.while_loop(lambda s: s.live, step, s, self.terms)
        # Loud under jit too, where only the status could tell.
        alpha = xp.where(s.status == int(Status.NON_FINITE), float("nan"), alpha * xp.ones_like(size))
        x = space.scale(alpha, s.total) if x0 is None else space.axpy(alpha, s.total, x0)
        return x, SolverInfo(s.steps, s.norm, rhs_norm, s.status)
