"""What `bl.diagnose` has measured."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bilevel.diagnosis.agreement import Agreements
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import Implicit
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo, Status

PRODUCTS = 20  # of Lanczos' method
LEFT = 0.1  # of the right-hand side, by a method without a tolerance


class Repetition(NamedTuple):
    """How much changes when the same is computed again, relative to its size.

    Attributes:
        product: a Hessian-vector product, from one linearization.
        new_product, new_grad, new_cross: products and ∂L/∂w, from another linearization at the same point.
    """

    product: float
    new_product: float
    new_grad: float
    new_cross: float


@dataclass(frozen=True)
class Measured:
    """The numbers of a report.

    For a fixed point or a root, read its residual for ∂L/∂w.

    Attributes:
        curvature: what H is: "hessian", "gauss-newton", "finite-differences", or "equation" for the transposed Jacobian
            of a fixed point or a root.
        method: the method that was looked at.
        info: how its solve ended.
        residual: norm of b - (H + damping I) v, by a product of a new linearization, relative to b; nan for a method
            that solves no linear system, or one for each batch.
        undamped_residual: the same without damping.
        value: F.
        change: of F, to first order, if the inner problem were solved from here: -v·∂L/∂w; nan likewise.
        grad_norm: norm of ∂L/∂w.
        distance: of the minimum, at least, relative to the norm of params: the step along ∂L/∂w to its lowest point.
            Where the Hessian is positive definite, the Newton step is no shorter. Infinite where L curves down there.
        eigenvalues: `Spectrum` of H: its ends and their errors, by 20 Lanczos products; nan where H is not symmetric.
        asymmetry: |u·Hv - v·Hu| for random u and v, relative to the size of such products; nan likewise.
        repetition: `Repetition`.
        derivatives: each derivative against differences.
        eps: the machine epsilon of params and hparams.
    """

    curvature: str
    method: Method
    info: SolverInfo
    residual: float
    undamped_residual: float
    value: float
    change: float
    grad_norm: float
    distance: float
    eigenvalues: Spectrum[float]
    asymmetry: float
    repetition: Repetition
    derivatives: Agreements
    eps: float

    @property
    def solver(self) -> LinearSolver[Any] | Method:
        """The solver of the call."""
        return self.method.solver if isinstance(self.method, Implicit) else self.method

    @property
    def repeatable(self) -> bool:
        """Whether the inner problem is the same at each evaluation, to rounding."""
        return max(self.repetition) <= self.eps**0.5

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The derivatives that differences could not be taken of, or said nothing about for their noise."""
        checked = {a.name for a in self.derivatives.of if not a.unclear}
        return tuple(name for name in self.derivatives.names if name not in checked)

    @property
    def verified(self) -> bool:
        """Whether all derivatives agree with differences."""
        return not self.unchecked and not any(a.wrong for a in self.derivatives.of)

    @property
    def solved(self) -> bool:
        """Whether the linear solve did what it promised, by the residual that it really leaves."""
        rtol = float(self.method.rtol)
        allowed = max(10 * rtol, self.eps**0.5) if rtol else LEFT
        return self.info.status == Status.CONVERGED and not self.residual > allowed

    @property
    def gain(self) -> float:
        """The relative change of F that solving the inner problem would bring; 0 where that is not known."""
        gain = self.change / self.value if self.value else 0.0
        return gain if self.info.status == Status.CONVERGED and abs(gain) < 1 else 0.0
