"""The base class of solvers of linear systems."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import is_dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

from typing_extensions import override

from bilevel.linear_solvers import advice
from bilevel.linear_solvers.solver import Solver
from bilevel.operators.lanczos import Spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import is_python_value
from bilevel.results import SolverInfo
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.rows import Rows

SYMMETRIC = "symmetric"
"""The operator is its own transpose."""
STEADY = "steady"
"""All products use the same operator."""
TRANSPOSED = "transposed"
"""The operator has products with its transpose."""
DEFINITE = "definite"
"""The operator is not indefinite at every solution, as the matrix of KKT conditions is."""
S = TypeVar("S")  # the state that several solves share


class LinearSolver(Solver, Generic[S]):
    """A solver of A v = b by products with A. With a Hessian A, v is an inverse-Hessian-vector product.

    Write a subclass as a frozen dataclass whose fields are the options. Only `solve` must be defined. The other
    attributes have defaults. A field of the dataclass may replace ``rtol`` or ``damping``.

    Attributes:
        requires: required properties of the operator: ``SYMMETRIC``, ``STEADY``, ``TRANSPOSED``, ``DEFINITE``.
        remedy: advice for a solve that stops too early.
        stagnation_remedy: advice for a solve that makes no more progress.
    """

    requires: ClassVar[frozenset[str]] = frozenset({SYMMETRIC, STEADY})
    remedy: ClassVar[str] = "Add damping."
    stagnation_remedy: ClassVar[str] = "Loosen rtol or add damping. If params is not float64, use float64."

    def init(self, A: LinearOperator[V]) -> S:
        """Return the state that several solves can share, such as a step size or a sketch. None: there is no state.

        The state is any tree of arrays. It stays valid as long as A does not change much.
        """
        return None  # pyright: ignore[reportReturnType]

    @abstractmethod
    def solve(self, state: S, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        """Return v and information about the solve.

        Args:
            state: the result of `init`.
            A: the operator, without the damping.
            b: the right-hand side.
            x0: a warm start, which a direct method may ignore. None: zero.
        """
        raise NotImplementedError(f"{self.name} has no method solve(state, A, b, x0), which returns (v, info).")

    def solve_rows(self, state: S, A: LinearOperator[V], b: V, x0: V | None, rows: Rows[V]) -> tuple[V, SolverInfo]:
        """Return the solutions for many right-hand sides, the rows of ``b``, and the info with arrays of shape (Q,).

        By default, it maps `solve` over the rows.
        """
        space = A.space

        def row(b: V, x0: V | None) -> tuple[V, SolverInfo]:
            x, info = _checked(self, state, A, b, x0)
            return x, in_arrays(info, space.dot(b, b), space.xp)

        return rows.batched(row, b, x0)

    def least_damping(self, state: S, A: LinearOperator[V]) -> Number:
        """Return the smallest automatic damping."""
        return 0.0

    def finder(self) -> LinearSolver[Any]:
        """Return the solver that finds the automatic damping: one that stops at negative curvature."""
        return self

    @property
    def most_steps(self) -> int | None:
        """The maximum number of steps of a solve. None: no option limits it."""
        return None

    @override
    def with_rtol(self, rtol: float) -> Self:
        return replace(self, rtol=rtol) if self.rtol and is_dataclass(self) else self  # pyright: ignore

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        return advice.explain(self, info, symmetric, curvature)


def run_solver(solver: LinearSolver[Any], A: LinearOperator[V], b: V, x0: V | None = None) -> tuple[V, SolverInfo]:
    """Return v of A v = b and information about the solve.

    Raise a TypeError if A lacks a property that the solver requires, or if the solver does not return such a pair.
    """
    check_requirements(solver, A)
    x, info = _checked(solver, solver.init(A), A, b, x0)
    return x, info if isinstance(solver.damping, str) else info._replace(damping=solver.damping)


def run_solver_on_rows(
    solver: LinearSolver[Any], A: LinearOperator[V], b: V, x0: V | None, rows: Rows[V]
) -> tuple[V, SolverInfo]:
    """Return the rows of v and information about the solves, as `run_solver` does."""
    check_requirements(solver, A)
    x, info = solver.solve_rows(solver.init(A), A, b, x0, rows)
    if isinstance(solver.damping, str):
        return x, info
    return x, info._replace(damping=A.space.xp.full_like(info.rhs_norm, solver.damping))


def _checked(
    solver: LinearSolver[Any], state: object, A: LinearOperator[V], b: V, x0: V | None
) -> tuple[V, SolverInfo]:
    solved: Any = solver.solve(state, A, b, x0)
    if not isinstance(solved, tuple) or len(solved) != 2 or not isinstance(solved[1], SolverInfo):
        raise TypeError(
            f"{solver.name}.solve(state, A, b, x0) must return (v, info), where info is a bl.SolverInfo. It returned "
            f"an object of type {type(solved).__name__}."
        )
    return solved


def in_arrays(info: SolverInfo, like: Array, xp: Any) -> SolverInfo:
    """Return scalars like an array in place of the Python numbers of an info."""
    return SolverInfo(*[xp.full_like(like, n) if is_python_value(n) else n for n in info])


def check_requirements(solver: LinearSolver[S], A: LinearOperator[V]) -> None:
    """Raise a TypeError if an operator lacks a property that a solver requires.

    Raise a ValueError for damping of KKT conditions.
    """
    if STEADY in solver.requires and A.sample is not None:
        raise TypeError(
            f"inner_args is a list, one batch per product, but {solver.name} needs the same "
            f"{'Hessian' if A.symmetric else 'Jacobian'} in all products. "
            "To use all batches in each product, pass inner_args=bl.MicroBatches(batches). For a new batch in each "
            'product, use solver="neumann" or "unrolled".'
        )
    if SYMMETRIC in solver.requires and not A.symmetric:
        raise TypeError(
            f"{solver.name} relies on a symmetric operator. The operator of a fixed point or a root is not symmetric. "
            'Use solver="gmres" or "bicgstab", {"name": "neumann", "step_size": 1.0} where the step contracts, '
            '"exact" where params is small, or "identity".'
        )
    if DEFINITE in solver.requires and A.indefinite:
        raise TypeError(
            f"{solver.name} relies on a positive definite operator, and the matrix of a bl.Constrained has eigenvalues "
            'of both signs. Use solver="minres" or "gmres", or "exact" where params is small.'
        )
    if A.indefinite and (isinstance(solver.damping, str) or (is_python_value(solver.damping) and solver.damping != 0)):
        raise ValueError(
            f"damping: expected 0 for a bl.Constrained, got {solver.damping!r}. Damping changes the constraints, so "
            "the hypergradient would be wrong. To make the objective strictly convex, add a penalty to it."
        )
    if TRANSPOSED in solver.requires and A.mv_transposed is None:
        raise TypeError(
            f"{solver.name} needs products with the operator and with its transpose. For the numpy backend, give the "
            "step or residual a method jvp_params(params, hparams, v, *args), which returns (∂r/∂w) v. In "
            'bl.hypergradient_from, write hvp=bl.NonSymmetric(product, transpose). Or use solver="gmres".'
        )
