"""The measurements of `bl.diagnose`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bilevel.diagnosis.agreement import Agreements
from bilevel.diagnosis.influence import Influence
from bilevel.diagnosis.kinks import Held
from bilevel.inspection.not_finite import NotFinite
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import Implicit
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.problems.protocols import EQUATIONS
from bilevel.results import SolverInfo, Status

PRODUCTS = 20  # of Lanczos' method
AWAY = 0.01  # relative distance from the minimum with hypergradient errors of ten per cent and more in experiments
LEFT = 0.1  # allowed relative residual of a method without a tolerance


class Repetition(NamedTuple):
    """The relative changes of results between repeated computations.

    Attributes:
        product: the change of a Hessian-vector product, with the same linearization.
        new_product, new_grad, new_cross: changes of products and ∂L/∂w, with another linearization at the same point.
    """

    product: float
    new_product: float
    new_grad: float
    new_cross: float


@dataclass(frozen=True)
class Measured:
    """The numbers of a report.

    For a fixed point or a root, its residual takes the place of ∂L/∂w.

    Attributes:
        curvature: the meaning of H: "hessian", "gauss-newton", "finite-differences", "proximal" for the reduced system
            of a proximal problem, "constrained" for the matrix of KKT conditions, or "equation" for the transposed
            Jacobian of a fixed point or a root.
        method: the method.
        info: information about the solve.
        residual: norm of b - (H + damping I) v, by a product of a new linearization, relative to b. nan for a method
            that solves no linear system, and for a list of batches.
        undamped_residual: the residual without damping.
        value: F.
        change: first-order change of F if the inner problem were solved: -v·∂L/∂w. nan in the same cases as
            ``residual``.
        grad_norm: norm of ∂L/∂w.
        grad_curvature: curvature of L along ∂L/∂w: gᵀHg / gᵀg for g = ∂L/∂w. For an equation, its absolute value.
        params_norm: norm of params.
        params_size: number of their entries.
        eigenvalues: `Spectrum` of H: extreme eigenvalues and errors, by 20 Lanczos products. nan if H is not symmetric.
        asymmetry: |u·Hv - v·Hu| for random u and v, relative to the size of such products. nan if H is not symmetric.
        repetition: `Repetition`.
        derivatives: the comparisons with differences.
        not_finite: the first quantity that is nan or infinite; None if all are finite.
        influence: hyperparameters and params without influence on the inner problem.
        held: the evidence that a kink or a bound holds params.
        kinks: the entries of params at a kink of a proximal step, where w*(λ) has no derivative.
        written: the leaves of params and hparams that a loss writes to.
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
    grad_curvature: float
    params_norm: float
    params_size: int
    eigenvalues: Spectrum[float]
    asymmetry: float
    repetition: Repetition
    derivatives: Agreements
    not_finite: NotFinite | None
    influence: Influence
    held: Held
    kinks: tuple[str, ...]
    written: tuple[str, ...]
    eps: float

    @property
    def is_equation(self) -> bool:
        """Whether params solves an equation and minimizes no smooth objective."""
        return self.curvature in EQUATIONS

    @property
    def all_held(self) -> bool:
        """Whether a proximal step holds all entries of params, so that w*(λ) does not change with them."""
        return self.curvature == "proximal" and self.eigenvalues.largest == 0

    @property
    def step(self) -> float:
        """A lower bound of the distance to the minimum: the step to the minimum along ∂L/∂w.

        It is at most the Newton step for a positive definite H, and infinite without positive curvature.
        """
        if self.grad_norm == 0:
            return 0.0
        return self.grad_norm / self.grad_curvature if self.grad_curvature > 0 else float("inf")

    @property
    def distance(self) -> float:
        """``step`` relative to the norm of params. If params is zero, its entries count as one."""
        return self.step / (self.params_norm or self.params_size**0.5)

    @property
    def solver(self) -> LinearSolver[Any] | Method:
        """The solver of the call."""
        return self.method.solver if isinstance(self.method, Implicit) else self.method

    @property
    def repeatable(self) -> bool:
        """Whether the inner problem is the same at each evaluation, to rounding."""
        return not any(change > self.eps**0.5 for change in self.repetition)  # nan twice is no change

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The derivatives without a comparison, or with differences that are too noisy."""
        checked = {a.name for a in self.derivatives.of if not a.unclear}
        return tuple(name for name in self.derivatives.names if name not in checked)

    @property
    def verified(self) -> bool:
        """Whether all derivatives agree with differences."""
        return not self.unchecked and not any(a.wrong for a in self.derivatives.of)

    @property
    def sensitivity(self) -> float:
        """‖∂F/∂w‖ · ‖params‖: to first order, the largest change of F for a relative change of params by one.

        On networks whose training has not ended at a minimum, it tells how far to trust a hypergradient: the smaller,
        the better (docs/which-method.md). It has the units of F.
        """
        return self.info.rhs_norm * self.params_norm

    @property
    def damping_found(self) -> bool:
        """Whether the solver has an automatic damping, and needed it."""
        return isinstance(self.method.damping, str) and bool(self.info.damping)

    @property
    def solved(self) -> bool:
        """Whether the true residual confirms that the linear solve converged."""
        rtol = float(self.method.rtol or 0.0)
        allowed = max(10 * rtol, self.eps**0.5) if rtol else LEFT
        return not self.method.failed(self.info.status) and not self.residual > allowed

    @property
    def gain(self) -> float:
        """The relative change of F if the inner problem were solved; 0 if it is unknown."""
        gain = self.change / self.value if self.value else 0.0
        return gain if self.info.status == Status.CONVERGED and abs(gain) < 1 else 0.0

    @property
    def is_away(self) -> bool:
        """Whether params is too far from a solution of the inner problem.

        The gradient of a random loss does not vanish, and a method that differentiates steps needs no minimum.
        """
        away = self.distance > AWAY or abs(self.gain) > AWAY
        return self.repeatable and not self.method.differentiates_steps and away

    @property
    def unsolvable(self) -> Influence:
        """The entries of params whose missing curvature does harm.

        With damping, the system has a solution. Then only whole leaves of params count. A method that differentiates
        steps solves no system.
        """
        found = self.influence
        if self.method.differentiates_steps:
            return Influence()
        if not self.info.damping:
            return found
        absent, straight = (
            tuple(share for share in shares if share.number == share.size) for shares in (found.absent, found.straight)
        )
        return found._replace(absent=absent, straight=straight)
