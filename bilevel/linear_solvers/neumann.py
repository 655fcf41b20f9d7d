"""The truncated Neumann series of Lorraine, Vicol & Duvenaud."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from bilevel.operators.combinators import copy, damped, norm, residual, scale_free
from bilevel.operators.lanczos import spectrum
from bilevel.options import check_int, check_real, is_python_value
from bilevel.protocols import NonSymmetric, Operator, Stochastic, Tree, VectorSpace
from bilevel.results import SolverInfo, Status


class _State(NamedTuple):
    total: Tree
    term: Tree
    norm: Any  # of the term
    least: Any  # of the norms so far
    index: Any  # of the step, counted in Python where the loop is one of Python
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
    """Return 1 / (largest |eigenvalue| + its error bound), by Lanczos; 1 for the zero operator.

    1 for an operator that is not symmetric, too: a fixed point's own iteration.
    """
    if isinstance(operator, NonSymmetric):
        return 1.0
    xp = space.xp
    ends = spectrum(operator, like, space)
    bound = xp.maximum(xp.abs(ends.smallest) + ends.smallest_error, xp.abs(ends.largest) + ends.largest_error)
    return 1.0 / xp.where(bound == 0, 1.0, bound)


@dataclass(frozen=True)
class Neumann:
    """v = α Σ_{j=0}^{terms} (I − α(H + damping I))^j b, by ``terms`` Hessian-vector products.

    Algorithm 3 of Lorraine, Vicol & Duvenaud (AISTATS 2020), with the final factor α that its first
    version lacks. Converges to (H + damping I)^{-1} b where H + damping I is positive definite and
    α < 2/λmax. For a symmetric operator the norms of the terms are log-convex in j: once one has grown they
    all will, so the first growth stops the series with ``DIVERGED``, at the last sum before it.

    ``info.residual_norm`` is the norm of the last term: the residual of the sum one term earlier, which bounds
    that of v while the series converges. With ``rtol`` the series stops once a term is below it, and is ``CONVERGED``
    if a product confirms that.

    With a warm start v0 the series corrects it: v0 + α Σ (I − αA)^j (b − A v0), at one more product.

    At a fixed point w = step(w, λ) with α = 1 the terms are those of its own iteration, (∂step/∂w)ᵀ applied j times.
    Such terms may grow before they shrink, and so may those over batches of data, a new one for each product (LiSSA:
    Agarwal, Bullins & Hazan, JMLR 2017). They count as ``DIVERGED`` a thousandfold above the first, or if the last
    one is above it. Of such batches ``residual_norm`` tells that the terms fall, not how well v solves the mean system,
    and a warm start is corrected by the first.

    Args:
        terms: products, >= 0; with 0, v = α b.
        step_size: α > 0. "auto": 1/(λmax + its error bound), from 12 Lanczos products more per call, on the first batch
            if there are several; `bl.prepare` takes them once for many calls. At a fixed point, 1.
        damping: added to the Hessian.
        rtol: stop early, at ``norm(b - A v) <= rtol * norm(b)``; 0: take all the terms.
    """

    nonsymmetric: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    remedy: ClassVar[str] = "Raise terms, loosen rtol, or add damping."

    terms: int = 20
    step_size: float | Literal["auto"] = "auto"
    damping: float = 0.0
    rtol: float = 0.0

    def __post_init__(self) -> None:
        check_int(self, "terms", least=0)
        check_step_size(self)
        check_real(self, "damping", least=0)
        check_real(self, "rtol", least=0)

    @property
    def maxiter(self) -> int:
        """Most terms."""
        return self.terms

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Return the step size, for `bl.prepare`."""
        if not isinstance(self.step_size, str):
            return {}
        step = safe_step(operator, like, space)
        return {"step_size": 1.0 / (1.0 / step + self.damping)}

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        alpha = self.prepare(operator, rhs, space).get("step_size", self.step_size)
        return scale_free(lambda b, x0, scale: self._series(operator, b, x0, alpha, space), rhs, x0, space)

    def _series(
        self, operator: Operator, rhs: Tree, x0: Tree | None, alpha: Any, space: VectorSpace
    ) -> tuple[Tree, SolverInfo]:
        xp, eps = space.xp, space.eps(rhs)
        A = damped(operator, self.damping, space)
        rhs_norm = norm(rhs, space)
        steady = not isinstance(operator, NonSymmetric | Stochastic)
        growth = 1 + 16 * eps  # more than rounding can do to a term that stays
        early = not (is_python_value(self.rtol) and self.rtol == 0)
        if early and isinstance(operator, Stochastic):
            raise TypeError(
                "Neumann.rtol: with a new batch for each product there is no one system whose residual could be "
                "measured. Leave it out, and set terms."
            )
        tolerance = xp.maximum(self.rtol * rhs_norm, eps * rhs_norm) if early else -xp.ones_like(rhs_norm)

        def step(s: _State) -> _State:
            B = damped(operator.sample(s.index), self.damping, space) if isinstance(operator, Stochastic) else A
            term = space.update(s.live, -alpha, B(s.term), s.term)  # of the last one, only the norm matters
            size = norm(term, space)
            finite, grown = xp.isfinite(size), size > (growth * s.least if steady else 1e3 * start_norm)
            ok = s.live & finite & ~grown
            status = xp.where(grown, int(Status.DIVERGED), s.status)
            status = xp.where(finite, status, int(Status.NON_FINITE))
            return _State(
                total=space.update(ok, 1, term, s.total),
                term=term,
                norm=xp.where(ok, size, s.norm),
                least=xp.where(ok, xp.minimum(size, s.least), s.least),
                index=s.index + 1,
                steps=s.steps + s.live,
                status=xp.where(s.live, status, s.status),
                live=ok & (size > tolerance),
            )

        if x0 is None:
            start = rhs
        else:
            x0 = space.select(rhs_norm > 0, x0, space.zeros_like(rhs))
            start = residual(A, rhs, x0, space)
        start_norm = norm(start, space)
        finite = xp.isfinite(start_norm) & xp.isfinite(start_norm * alpha)
        steps = xp.zeros_like(start_norm, dtype=xp.int32)
        s = _State(
            total=copy(start, space),
            term=copy(start, space),
            norm=start_norm,
            least=start_norm,
            index=0,
            steps=steps,
            status=xp.where(finite, xp.full_like(steps, int(Status.CONVERGED)), int(Status.NON_FINITE)),
            live=finite & (start_norm > tolerance),
        )
        s = space.while_loop(lambda s: s.live, step, s, self.terms)
        # Loud under jit too, where only the status could tell.
        alpha = xp.where(s.status == int(Status.NON_FINITE), float("nan"), alpha * xp.ones_like(start_norm))
        x = space.scale(alpha, s.total) if x0 is None else space.axpy(alpha, s.total, x0)
        left, status = s.norm, s.status
        fine = status == int(Status.CONVERGED)
        if early:
            left = xp.where(fine, norm(residual(A, rhs, x, space), space), left)
            status = xp.where(fine & (left > tolerance), int(Status.MAXITER), status)
        if not steady:
            status = xp.where(fine & (s.norm > start_norm), int(Status.DIVERGED), status)
        return x, SolverInfo(s.steps, left, rhs_norm, status)
