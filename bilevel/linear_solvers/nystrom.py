"""The inverse of a low-rank approximation."""

from dataclasses import dataclass
from typing import Any, ClassVar

from bilevel.operators.combinators import damped, norm, residual, scale_free
from bilevel.operators.nystrom_sketch import Sketch, sketch
from bilevel.options import check_int, check_real
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status


@dataclass(frozen=True)
class Nystrom:
    """v = (Ĥ + damping I)⁻¹ b with a Nyström approximation Ĥ of rank r (Hataya & Yamada, AISTATS 2023).

    For Hessians with few large eigenvalues. The error is that of the rest: ``damping`` must not be small against the
    eigenvalues that the sketch leaves out. A residual above ``rtol`` gives ``MAXITER``, or ``NEGATIVE_CURVATURE`` if
    the sketch has met it: its directions count as zero. A warm start is not used.

    r + 1 products, the last for the true residual; with a ``sketch`` from `bl.prepare`, that one only.

    Args:
        rank: r >= 1; as many vectors are stored, three times as many while the sketch is made.
        damping: added to the Hessian, > 0.
        seed: of the random vectors.
        sketch: made before, by `bl.prepare`; ``rank`` and ``seed`` then do not matter.
        rtol: what ``CONVERGED`` promises of ``norm(b - (H + damping I) v) / norm(b)``.
    """

    remedy: ClassVar[str] = (
        "Raise rank or damping, since what the sketch leaves out is large against the damping; if it is one of "
        "bl.prepare, prepare anew. Or loosen rtol."
    )

    rank: int = 20
    damping: float = 0.01
    seed: int = 0
    sketch: Sketch | None = None
    rtol: float = 0.1

    def __post_init__(self) -> None:
        check_int(self, "rank", least=1)
        check_real(self, "damping", above=0)
        check_int(self, "seed", least=0)
        check_real(self, "rtol", least=0)

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Return the sketch, for `bl.prepare`."""
        return {"sketch": sketch(operator, like, self.rank, self.seed, space)}

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        del x0
        xp = space.xp
        known = self.sketch
        if known is None:
            known = sketch(operator, rhs, self.rank, self.seed, space)
        products = 0 if self.sketch is not None else len(known.eigenvalues)
        A = damped(operator, self.damping, space)

        def solve(b: Tree, x0: None, scale: Any) -> tuple[Tree, SolverInfo]:
            within, rest = space.project(known.vectors, b), b
            for _ in range(2):  # a division by the damping would blow up what once leaves of the sketched directions
                overlap = space.project(known.vectors, rest)
                rest = space.axpy(-1.0, space.combine(overlap, known.vectors), rest)
            x = space.combine(within / (known.eigenvalues + self.damping), known.vectors)
            x = space.axpy(1.0 / self.damping, rest, x)
            rhs_norm, left = norm(b, space), norm(residual(A, b, x, space), space)
            steps = xp.full_like(rhs_norm, products, dtype=xp.int32)
            indefinite = known.smallest < -100 * space.eps(b)
            status = xp.where(indefinite, int(Status.NEGATIVE_CURVATURE), xp.full_like(steps, int(Status.MAXITER)))
            status = xp.where(left <= self.rtol * rhs_norm, int(Status.CONVERGED), status)
            status = xp.where(xp.isfinite(left), status, int(Status.NON_FINITE))
            return x, SolverInfo(steps, left, rhs_norm, status)

        return scale_free(solve, rhs, None, space)
