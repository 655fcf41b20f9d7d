"""The truncated Neumann series."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import with_auto_damping
from bilevel.linear_solvers.linear_solver import DEFINITE, LinearSolver
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import scale_free
from bilevel.options import check_int, check_real, check_step_size, is_python_value
from bilevel.preconditioners.function import set_preconditioner
from bilevel.preconditioners.preconditioner import Preconditioner, applied, init
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V


class _State(NamedTuple, Generic[V]):
    total: V
    term: V
    norm: Array  # of the term
    least: Array  # the smallest norm of a term
    term_index: Array | int  # a Python number in a Python loop
    steps: Array
    status: Array
    live: Array


def safe_step(A: LinearOperator[V]) -> Number:
    """Return 1 / (largest |eigenvalue| + its error bound), by Lanczos' method, or 1 for the zero operator.

    For an operator that is not symmetric, return 1, which is the step of a fixed-point iteration.
    """
    if not A.symmetric:
        return 1.0
    xp, ends = A.space.xp, spectrum(A)
    bound = xp.maximum(xp.abs(ends.smallest) + ends.smallest_error, xp.abs(ends.largest) + ends.largest_error)
    return 1.0 / xp.where(bound == 0, 1.0, bound)


@dataclass(frozen=True)
class Neumann(LinearSolver[Any]):
    """v = α Σ_{j=0}^{terms} (I − α(H + damping I))^j b, by ``terms`` Hessian-vector products.

    Algorithm 3 of Lorraine, Vicol & Duvenaud (AISTATS 2020), with the final factor α that its first version lacks. The
    series converges to (H + damping I)^{-1} b if H + damping I is positive definite and α < 2/λmax. For a symmetric
    operator, the norms of the terms are log-convex in j: once they grow, they keep growing. So the series stops at
    the first growth, with ``DIVERGED`` and the sum before it. If the norms stay equal, no curvature was seen, and the
    status is ``NEGATIVE_CURVATURE``.

    ``info.residual_norm`` is the norm of the last term. It is the residual of the sum without that term, and bounds
    the residual of v if the series converges. After ``DIVERGED``, it is the residual of v. With ``rtol``, the series
    stops at the first term below the tolerance. Then the status is ``CONVERGED`` if a product confirms the residual.

    A warm start v0 is corrected by the series: v0 + α Σ (I − αA)^j (b − A v0), at one more product.

    At a fixed point w = step(w, λ) with α = 1, term j is ((∂step/∂w)ᵀ)^j b. Such terms may grow before they shrink. So
    may terms over a list of batches, with a new batch for each product (LiSSA: Agarwal, Bullins & Hazan, JMLR 2017). In
    both cases the status is ``DIVERGED`` if a term exceeds the first a thousandfold, or if the last term exceeds it.
    With batches, ``residual_norm`` is nan, and the first batch corrects a warm start.

    Args:
        terms: number of products, >= 0. With 0, v = α b.
        step_size: α > 0. "auto": 1/(λmax + its error bound), from 12 more Lanczos products per call, on the first
            batch; `bl.prepare` takes them once for many calls. At a fixed point, "auto" is 1.
        damping: added to the diagonal of the operator. "auto": zero, unless the series diverges; then as in `CG`. Few
            terms need little damping, since they resolve no curvature below λmax / terms.
        rtol: stop early, at ``norm(b - A v) <= rtol * norm(b)``. 0 or None: take all terms.
        preconditioner: as in `CG`. Then v = α M Σ (I − α A M)^j b, which converges if the eigenvalues of A M are
            between 0 and 2 / α. "auto" is α = 1, for an M that is close to the inverse of A. Terms may grow, as at a
            fixed point.
    """

    requires: ClassVar[frozenset[str]] = frozenset({DEFINITE})
    remedy: ClassVar[str] = "Raise terms, loosen rtol, or add damping."

    terms: int = 20
    step_size: float | Literal["auto"] = "auto"
    damping: float | Literal["auto"] = 0.0
    rtol: float | None = 0.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_int(self, "terms", least=0)
        check_step_size(self)
        check_real(self, "damping", auto=True)
        check_real(self, "rtol", none=True)
        set_preconditioner(self)

    @property
    @override
    def most_steps(self) -> int:
        return self.terms

    @override
    def init(self, A: LinearOperator[V]) -> Any:
        """Return the step size α for a damping of zero, with a preconditioner the pair of α and its state."""
        M, automatic = self.preconditioner, isinstance(self.step_size, str)
        if M is not None:
            return (1.0 if automatic else self.step_size), init(M, A)
        return safe_step(A) if automatic else self.step_size

    @override
    @with_auto_damping
    def solve(self, state: Any, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        M, damping = self.preconditioner, self.fixed_damping
        if M is not None:
            alpha, state = state
        else:
            alpha = 1.0 / (1.0 / state + damping) if isinstance(self.step_size, str) else state
        A, precondition = A.damped(damping), applied(M, state, damping, A.space)
        return scale_free(lambda b, x0, scale: self._series(alpha, A, precondition, b, x0), b, x0, A.space)

    def _series(
        self, alpha: Number, A: LinearOperator[V], precondition: Callable[[V], V], rhs: V, x0: V | None
    ) -> tuple[V, SolverInfo]:
        space, steady = A.space, A.steady and self.preconditioner is None
        xp, eps, rhs_norm = space.xp, space.eps, space.norm(rhs)
        growth = 1 + 16 * eps  # more than the growth by rounding
        rtol = 0.0 if self.rtol is None else self.rtol
        early = not (is_python_value(rtol) and rtol == 0)
        if early and A.sample is not None:
            raise TypeError(
                "Neumann.rtol: with a new batch for each product, there is no single system whose residual could be "
                "measured. Leave rtol out, and set terms."
            )
        tolerance = xp.maximum(rtol * rhs_norm, eps * rhs_norm) if early else -xp.ones_like(rhs_norm)

        def step(s: _State[V]) -> _State[V]:
            term = space.axpby_where(s.live, -alpha, A.at(s.term_index)(precondition(s.term)), s.term)
            size = space.norm(term)
            finite, grown = xp.isfinite(size), size > (growth * s.least if steady else 1e3 * start_norm)
            ok = s.live & finite & ~grown
            status = xp.where(grown, int(Status.DIVERGED), s.status)
            status = xp.where(finite, status, int(Status.NON_FINITE))
            return _State(
                total=space.axpby_where(ok, 1, term, s.total),
                term=term,
                norm=xp.where(s.live, size, s.norm),
                least=xp.where(ok, xp.minimum(size, s.least), s.least),
                term_index=s.term_index + 1,
                steps=xp.where(s.live, s.steps + 1, s.steps),
                status=xp.where(s.live, status, s.status),
                live=ok & (size > tolerance),
            )

        if x0 is None:
            start = rhs
        else:
            x0 = space.where(rhs_norm > 0, x0, space.zeros())
            start = A.residual(rhs, x0)
        start_norm = space.norm(start)
        finite = xp.isfinite(start_norm) & xp.isfinite(start_norm * alpha)
        steps = xp.zeros_like(start_norm, dtype=xp.int32)
        s = _State(
            total=space.copy(start),
            term=space.copy(start),
            norm=start_norm,
            least=start_norm,
            term_index=0,
            steps=steps,
            status=xp.where(finite, xp.full_like(steps, int(Status.CONVERGED)), int(Status.NON_FINITE)),
            live=finite & (start_norm > tolerance),
        )
        s = space.while_loop(lambda s: s.live, step, s, self.terms)
        total = precondition(s.total)
        x = space.scale(alpha, total) if x0 is None else space.axpy(alpha, total, x0)
        left, status = s.norm, s.status
        fine = status == int(Status.CONVERGED)
        # If no term is smaller than the first, the sum only grows: no positive curvature was seen.
        flat = fine & (s.steps > 0) & (s.norm >= (1 - 4 * eps) * start_norm) & (start_norm > 0)
        status = xp.where(flat, int(Status.NEGATIVE_CURVATURE if A.symmetric else Status.DIVERGED), status)
        if early:
            left = xp.where(fine, space.norm(A.residual(rhs, x)), left)
            status = xp.where(fine & ~flat & (left > tolerance), int(Status.MAXITER), status)
        if not steady:
            status = xp.where(fine & (s.norm > start_norm), int(Status.DIVERGED), status)
        if A.sample is not None:
            left = left + float("nan")
        return x, SolverInfo(s.steps, left, rhs_norm, status)
