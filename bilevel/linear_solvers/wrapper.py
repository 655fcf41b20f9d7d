"""A linear solver around another one."""
# pyright: reportIncompatibleVariableOverride=false, reportAssignmentType=false
# (The options of the inner solver are read. They are not stored a second time.)

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo


class Wrapper(LinearSolver[S]):
    """A solver that has the properties and options of another one, ``solver``."""

    solver: LinearSolver[S]
    requires = property(lambda self: self.solver.requires)
    rtol = property(lambda self: self.solver.rtol)
    damping = property(lambda self: self.solver.damping)

    @property
    @override
    def name(self) -> str:
        return self.solver.name

    @property
    @override
    def summary(self) -> str:
        return self.solver.summary

    @property
    @override
    def most_steps(self) -> int | None:
        return self.solver.most_steps

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return self.solver.explain(info, symmetric, curvature)

    @override
    def record(self, info: SolverInfo) -> None:
        self.solver.record(info)
