"""A linear solver around another one."""
# pyright: reportIncompatibleVariableOverride=false
# (The options of the solver inside are read, and not stored a second time.)

from typing import Generic

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo


class Wrapper(LinearSolver[S], Generic[S]):
    """A solver that has the properties and options of another one, ``solver``."""

    solver: LinearSolver[S]
    requires = property(lambda self: self.solver.requires)
    name = property(lambda self: self.solver.name)
    summary = property(lambda self: self.solver.summary)
    rtol = property(lambda self: self.solver.rtol)
    damping = property(lambda self: self.solver.damping)
    maxiter = property(lambda self: self.solver.maxiter)

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return self.solver.explain(info, symmetric, curvature)

    @override
    def record(self, info: SolverInfo) -> None:
        self.solver.record(info)
