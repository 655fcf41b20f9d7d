"""Differentiation by the implicit function theorem."""
# pyright: reportAssignmentType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from typing_extensions import override

from bilevel.backend import Backend
from bilevel.linear_solvers.linear_solver import LinearSolver, check_requirements, run_solver
from bilevel.linear_solvers.prepared import Prepared
from bilevel.linear_solvers.wrapper import Wrapper
from bilevel.linearization import LinearizedMap
from bilevel.methods.method import Level, Method, Pullback, Solution
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import H, P
from bilevel.spaces.space import Layout


@dataclass(frozen=True)
class Implicit(Wrapper, Method):
    """Implicit differentiation: a linear solver computes v of (∂r/∂w)ᵀ v = c. Then (dw*/dλ)ᵀ c = −(∂r/∂λ)ᵀ v.

    Lorraine, Vicol & Duvenaud (AISTATS 2020), theorem 1. The method leaves params where they are.
    """

    solver: LinearSolver[Any]
    differentiates_steps = False
    stateful = property(lambda self: self.solver.stateful)

    @override
    def solve(self, level: Level[P, H], adjoint0: P | None) -> Solution[P, H]:
        def pullback(cotangent: P) -> Pullback[P, H]:
            at = level.linearize()
            return pull_back(level.backend, self.solver, level.operator(at), at, cotangent, adjoint0)

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


def as_method(solver: LinearSolver[Any] | Method) -> Method:
    """Return a method as it is, or implicit differentiation by a linear solver."""
    return Implicit(solver) if isinstance(solver, LinearSolver) else solver


def pull_back(
    backend: Backend,
    solver: LinearSolver[Any],
    A: LinearOperator[P],
    at: LinearizedMap[P, H],
    cotangent: P,
    adjoint0: P | None,
) -> Pullback[P, H]:
    """Solve A v = cotangent, where A is v -> (∂r/∂w)ᵀ v, or its reduction. Return −(∂r/∂λ)ᵀ v, and the solution.

    ``at`` is the linearized map. ``adjoint0`` is a warm start. If the residual of the map is known (not None), the info
    has its norm and the estimate of F(params) − F(w*), and a nan in it sets the status ``NON_FINITE``.

    Raise a TypeError if A lacks a property that the solver requires.
    """
    solution, info = run_solver(solver, A, at.rhs(cotangent), adjoint0)
    pulled = pull_back_adjoint(backend, A, at, cotangent, solution, info)
    return pulled._replace(info=pulled.info._replace(kinks=at.count_kinks(A.space)))


def solve_reduced(
    solver: LinearSolver[Any], A: LinearOperator[P], at: LinearizedMap[P, Any], rhs: P, transposed: bool
) -> tuple[P, SolverInfo]:
    """Return t of (∂r/∂w) t = rhs, or with ``transposed`` v of (∂r/∂w)ᵀ v = rhs, by the reduction A of the map."""
    if transposed:
        y, info = run_solver(solver, A, at.rhs(rhs))
        t = at.adjoint(y, rhs)
    else:
        assert at.reduction is not None
        assert at.reduction.forward is not None
        b, solution = at.reduction.forward(rhs)
        y, info = run_solver(solver, A, b)
        t = solution(y)
    return t, info._replace(kinks=at.count_kinks(A.space))


def pull_back_adjoint(
    backend: Backend, A: LinearOperator[P], at: LinearizedMap[P, H], cotangent: P, solution: P, info: SolverInfo
) -> Pullback[P, H]:
    """Return −(∂r/∂λ)ᵀ v for a linear system that is solved. See `pull_back`."""
    adjoint = at.adjoint(solution, cotangent)
    if at.residual is not None:
        # A Newton step leads to w*: w − w* ≈ (∂r/∂w)⁻¹ r, and F changes by c·(w − w*) ≈ v·r.
        error, xp = A.space.dot(adjoint, at.residual), A.space.xp
        status = xp.where(xp.isfinite(error), info.status, int(Status.NON_FINITE))
        info = info._replace(inner_grad_norm=A.space.norm(at.residual), status=status)
        if A.sample is None:  # the residual of one batch is not zero at the solution of all
            info = info._replace(value_error=error)
    product = at.vjp_hparams(adjoint)
    grad = None if product is None else backend.space(product).scale(-1.0, product)
    return Pullback(grad, solution, info, at.dependence() if at.dependence else None)
