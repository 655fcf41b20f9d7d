"""Differentiation by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from typing_extensions import override

from bilevel.backend import Backend
from bilevel.linear_solvers.linear_solver import LinearSolver, check_requirements
from bilevel.linear_solvers.prepared import Prepared
from bilevel.linearization import LinearizedMap
from bilevel.methods.method import Level, Method, Pullback, Solution
from bilevel.operators.lanczos import Spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import H, P
from bilevel.spaces.space import Layout


@dataclass(frozen=True)
class Implicit(Method):
    """(dw*/dλ)ᵀ c = −(∂r/∂λ)ᵀ v with (∂r/∂w)ᵀ v = c, by a linear solver.

    Lorraine, Vicol & Duvenaud (AISTATS 2020), theorem 1.
    """

    solver: LinearSolver[Any]
    differentiates_steps = False
    stateful = property(lambda self: self.solver.stateful)  # pyright: ignore[reportAssignmentType]
    damping = property(lambda self: self.solver.damping)  # pyright: ignore[reportAssignmentType]
    rtol = property(lambda self: self.solver.rtol)  # pyright: ignore[reportAssignmentType]

    @property
    @override
    def name(self) -> str:
        return self.solver.name

    @property
    @override
    def summary(self) -> str:
        return self.solver.summary

    @override
    def solve(self, level: Level[P, H], adjoint0: P | None) -> Solution[P, H]:
        def pullback(cotangent: P) -> Pullback[P, H]:
            at = level.linearize()
            A = level.operator(at)
            return pull_back(level.backend, self.solver, A, at, cotangent, adjoint0)

        return Solution(level.params, pullback)

    @override
    def init(self, level: Level[P, H]) -> object:
        A = level.operator(level.linearize())
        check_requirements(self.solver, A)
        return self.solver.init(A)

    @override
    def with_state(self, state: object, layout: Layout) -> Self:
        return self if state is None else replace(self, solver=Prepared(self.solver, state, layout))

    @override
    def with_rtol(self, rtol: float) -> Self:
        return replace(self, solver=self.solver.with_rtol(rtol))

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return self.solver.explain(info, symmetric, curvature)

    @override
    def record(self, info: SolverInfo) -> None:
        self.solver.record(info)


def as_method(solver: LinearSolver[Any] | Method) -> Method:
    """Return the method that a solver stands for: a linear solver stands for implicit differentiation by it."""
    return Implicit(solver) if isinstance(solver, LinearSolver) else solver


def pull_back(
    backend: Backend,
    solver: LinearSolver[Any],
    A: LinearOperator[P],
    at: LinearizedMap[P, H],
    cotangent: P,
    adjoint0: P | None,
) -> Pullback[P, H]:
    """Solve A v = cotangent, and return −(∂r/∂λ)ᵀ v with v.

    Args:
        backend: the framework.
        solver: the solver.
        A: v -> (∂r/∂w)ᵀ v.
        at: the linearized map. Its residual may be None if it is not known.
        cotangent: the right-hand side, such as ∂F/∂w.
        adjoint0: a warm start.

    Raises:
        TypeError: if A lacks a property that the solver requires.
    """
    check_requirements(solver, A)
    adjoint, info = solver.solve(solver.init(A), A, cotangent, adjoint0)
    if at.residual is not None:
        info = info._replace(inner_grad_norm=A.space.norm(at.residual))
    product = at.vjp_hparams(adjoint)
    return Pullback(None if product is None else backend.space(product).scale(-1.0, product), adjoint, info)
