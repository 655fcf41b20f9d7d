"""The inverse of a low-rank approximation of the Hessian."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import with_auto_damping
from bilevel.linear_solvers.linear_solver import DEFINITE, STEADY, SYMMETRIC, LinearSolver
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.nystrom_sketch import Sketch, sketch
from bilevel.operators.scaling import scale_free
from bilevel.options import check_int, check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V


@dataclass(frozen=True)
class Nystrom(LinearSolver[Sketch]):
    """v = (Ĥ + damping I)⁻¹ b with a Nyström approximation Ĥ of rank r (Hataya & Yamada, AISTATS 2023).

    For Hessians with few large eigenvalues. ``damping`` must not be small against the eigenvalues outside the sketch.
    A residual above ``rtol`` gives ``MAXITER``, or ``NEGATIVE_CURVATURE`` if the sketch has negative curvature in spite
    of the damping. A sketch without positive curvature gives ``NEGATIVE_CURVATURE``. Directions of negative curvature
    count as zero curvature. A warm start is not used.

    The sketch takes r products, and the true residual one more. `bl.prepare` makes the sketch once for several calls.
    ``info.steps`` is r.

    Args:
        rank: r >= 1. The sketch stores r vectors, and 3r vectors while it is computed.
        damping: added to the Hessian, > 0. "auto": the smallest eigenvalue of the sketch; with negative curvature, at
            least 2 |λmin|, as in `CG`.
        seed: seed of the random vectors.
        rtol: largest ``norm(b - (H + damping I) v) / norm(b)`` with the status ``CONVERGED``. None: any residual is
            accepted, without a warning.
    """

    requires: ClassVar[frozenset[str]] = frozenset({SYMMETRIC, STEADY, DEFINITE})
    remedy: ClassVar[str] = (
        "Eigenvalues outside the sketch are large against the damping: raise rank or damping, or loosen rtol. If the "
        "sketch comes from bl.prepare, prepare again."
    )

    rank: int = 20
    damping: float | Literal["auto"] = 0.01
    seed: int = 0
    rtol: float | None = 0.1

    def __post_init__(self) -> None:
        check_int(self, "rank", least=1)
        check_int(self, "seed", least=0)
        check_real(self, "damping", above=0, auto=True)
        check_real(self, "rtol", none=True)

    @override
    def init(self, A: LinearOperator[V]) -> Sketch:
        """Return the sketch."""
        return sketch(A, self.rank, self.seed)

    @override
    def least_damping(self, state: Sketch, A: LinearOperator[V]) -> Array:
        """Return the smallest eigenvalue of the sketch. Few eigenvalues outside of it are larger."""
        xp, eigenvalues = A.space.xp, state.eigenvalues
        least = xp.maximum(xp.min(eigenvalues), A.space.eps**0.5 * xp.max(eigenvalues))
        return xp.where(least > 0, least, 1.0)  # a sketch of zeros or nan: any damping gives the failure

    @override
    @with_auto_damping
    def solve(self, state: Sketch, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A, known = A.damped(self.fixed_damping), state
        space, xp = A.space, A.space.xp

        def solve(b: V, x0: V | None, scale: Array) -> tuple[V, SolverInfo]:
            within, rest = space.stack_dot(known.vectors, b), b
            for _ in range(2):  # after one pass, the division by the damping would magnify the rounding errors
                overlap = space.stack_dot(known.vectors, rest)
                rest = space.subtract(rest, space.linear_combination(overlap, known.vectors))
            x = space.linear_combination(within / (known.eigenvalues + self.fixed_damping), known.vectors)
            x = space.axpy(1.0 / self.fixed_damping, rest, x)
            rhs_norm, left = space.norm(b), space.norm(A.residual(b, x))
            steps = xp.full_like(rhs_norm, known.eigenvalues.shape[0], dtype=xp.int32)
            top = xp.max(known.eigenvalues)
            indefinite = known.smallest * top + self.fixed_damping < -100 * space.eps * top
            status = xp.where(indefinite, int(Status.NEGATIVE_CURVATURE), xp.full_like(steps, int(Status.MAXITER)))
            rtol = space.eps if self.rtol is None else self.rtol
            # Without positive curvature, v is b / damping for any b.
            flat = ~(top > space.eps * self.fixed_damping) & (rhs_norm > 0)
            status = xp.where(flat, int(Status.NEGATIVE_CURVATURE), status)
            status = xp.where((left <= A.tolerance(rtol * rhs_norm, x)) & ~flat, int(Status.CONVERGED), status)
            status = xp.where(xp.isfinite(left), status, int(Status.NON_FINITE))
            return x, SolverInfo(steps, left, rhs_norm, status)

        return scale_free(solve, b, None, space)
