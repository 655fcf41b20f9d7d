"""Solvers around another solver."""
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false, reportAssignmentType=false

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.linear_solvers.solver import Solver
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo


class Wrapper(Solver):
    """A solver with the options and messages of another solver, ``solver``."""

    solver: Solver
    damping = property(lambda self: self.solver.damping)
    rtol = property(lambda self: self.solver.rtol)
    name = property(lambda self: self.solver.name)
    summary = property(lambda self: self.solver.summary)

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return self.solver.explain(info, symmetric, curvature)

    @override
    def record(self, info: SolverInfo) -> None:
        self.solver.record(info)


class LinearSolverWrapper(Wrapper, LinearSolver[S]):
    """A linear solver with the properties, options and messages of another one, ``solver``."""

    solver: LinearSolver[S]
    requires = property(lambda self: self.solver.requires)
    most_steps = property(lambda self: self.solver.most_steps)
