"""The inverse Hessian replaced by a multiple of the identity."""

from dataclasses import dataclass
from typing import Any, ClassVar

from bilevel.operators.combinators import norm, scale_free
from bilevel.options import check_real
from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status


@dataclass(frozen=True)
class Identity:
    """v = scale · b, without a Hessian-vector product.

    T1-T2 of Luketina et al. (ICML 2016), the identity of Lorraine et al. (2020), section 5; JFB for fixed
    points. A cheap direction, not a solve: ``residual_norm`` is nan, since it would take a product.

    Args:
        scale: stands for the inverse curvature; the inner learning rate is the usual choice. Only the
            size of the hypergradient depends on it where F has no direct λ.
    """

    nonsymmetric: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_real(self, "scale", above=0)

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        del operator, x0

        def solve(b: Tree, x0: None, scale: Any) -> tuple[Tree, SolverInfo]:
            del x0, scale
            xp, rhs_norm = space.xp, norm(b, space)
            zero = xp.zeros_like(rhs_norm, dtype=xp.int32)
            status = xp.where(xp.isfinite(rhs_norm), int(Status.CONVERGED), xp.full_like(zero, int(Status.NON_FINITE)))
            unknown = xp.full_like(rhs_norm, float("nan"))
            return space.scale(self.scale, b), SolverInfo(zero, unknown, rhs_norm, status)

        return scale_free(solve, rhs, None, space)
