"""A linear solver with its preliminary work done."""

from dataclasses import dataclass, field, replace
from typing import Self

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.linear_solvers.wrapper import Wrapper
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import V
from bilevel.spaces.layout import compare_layouts
from bilevel.spaces.space import Layout


@dataclass(frozen=True)
class Prepared(Wrapper[S]):
    """A solver with a state that serves several calls, as `bl.prepare` returns it.

    Args:
        solver: the solver.
        state: the result of its `init`.
        layout: shapes and dtypes of the params that the state was made for.
    """

    solver: LinearSolver[S]
    state: S
    layout: Layout = field(repr=False)

    @override
    def init(self, A: LinearOperator[V]) -> S:
        compare_layouts(
            "params", A.space.layout(A.space.like), "the params that the solver was prepared for", self.layout
        )
        return self.state

    @override
    def solve(self, state: S, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        return self.solver.solve(state, A, b, x0)

    @override
    def with_rtol(self, rtol: float) -> Self:
        return replace(self, solver=self.solver.with_rtol(rtol))
