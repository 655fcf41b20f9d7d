"""A linear solver around another one."""
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false, reportAssignmentType=false

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo


class Wrapper(LinearSolver[S]):
    """A solver with the properties and options of another solver, ``solver``."""

    solver: LinearSolver[S]
    requires = property(lambda self: self.solver.requires)
    rtol = property(lambda self: self.solver.rtol)
    damping = property(lambda self: self.solver.damping)
    name = property(lambda self: self.solver.name)
    summary = property(lambda self: self.solver.summary)
    most_steps = property(lambda self: self.solver.most_steps)

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return self.solver.explain(info, symmetric, curvature)

    @override
    def record(self, info: SolverInfo) -> None:
        self.solver.record(info)
