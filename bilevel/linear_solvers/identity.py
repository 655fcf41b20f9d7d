"""A multiple of the identity in place of the inverse Hessian."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import scale_free
from bilevel.options import check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V


@dataclass(frozen=True)
class Identity(LinearSolver[None]):
    """v = scale · b, without a Hessian-vector product.

    It is T1-T2 of Luketina et al. (ICML 2016), and the identity of Lorraine et al. (2020), section 5. For fixed points
    it is JFB. It gives a cheap direction, not a solution. ``residual_norm`` is nan, because it would take a product.

    Args:
        scale: replaces the inverse curvature. The inner learning rate is the usual choice. If F does not depend
            directly on λ, only the size of the hypergradient depends on ``scale``.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_real(self, "scale", above=0)

    @override
    def solve(self, state: None, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        space = A.space

        def solve(b: V, x0: V | None, scale: Array) -> tuple[V, SolverInfo]:
            del x0, scale
            xp, rhs_norm = space.xp, space.norm(b)
            zero = xp.zeros_like(rhs_norm, dtype=xp.int32)
            status = xp.where(xp.isfinite(rhs_norm), int(Status.CONVERGED), xp.full_like(zero, int(Status.NON_FINITE)))
            unknown = xp.full_like(rhs_norm, float("nan"))
            return space.scale(self.scale, b), SolverInfo(zero, unknown, rhs_norm, status)

        return scale_free(solve, b, None, space)
