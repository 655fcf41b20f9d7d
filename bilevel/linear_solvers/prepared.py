"""A linear solver with a fixed state."""

from dataclasses import dataclass, field, replace
from typing import Self

from typing_extensions import override

from bilevel.linear_solvers.linear_solver import LinearSolver, S
from bilevel.linear_solvers.wrapper import LinearSolverWrapper
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import V
from bilevel.spaces.layout import compare_layouts
from bilevel.spaces.rows import Rows
from bilevel.spaces.space import Layout


@dataclass(frozen=True)
class Prepared(LinearSolverWrapper[S]):
    """A solver with a fixed state for several calls, as returned by `bl.prepare`.

    Args:
        solver: the solver.
        state: the result of its `init`.
        layout: shapes and dtypes of the params that the state belongs to.
    """

    solver: LinearSolver[S]
    state: S
    layout: Layout = field(repr=False)

    @override
    def init(self, A: LinearOperator[V]) -> S:
        found, prepared_for = A.space.layout(A.space.like), "the params that the solver was prepared for"
        compare_layouts("params", found, prepared_for, self.layout)
        return self.state

    @override
    def solve(self, state: S, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        return self.solver.solve(state, A, b, x0)

    @override
    def solve_rows(self, state: S, A: LinearOperator[V], b: V, x0: V | None, rows: Rows[V]) -> tuple[V, SolverInfo]:
        return self.solver.solve_rows(state, A, b, x0, rows)

    @override
    def with_rtol(self, rtol: float) -> Self:
        return replace(self, solver=self.solver.with_rtol(rtol))
