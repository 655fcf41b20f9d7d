"""Compute the hypergradients of many outer objectives by one call."""

from typing import Any

from bilevel.backend import Backend, stacked
from bilevel.config import get_linear_solver
from bilevel.convergence import OnFailure, check_on_failure, report_rows, warn_if_not_kkt
from bilevel.dependence import EQUATION, MINIMUM, warn_of_dependence
from bilevel.hypergradient import SolverSpec, combine
from bilevel.linear_solvers.linear_solver import LinearSolver, in_arrays, run_solver_on_rows
from bilevel.linearization import OuterDerivatives
from bilevel.methods.implicit import Implicit, pull_back_adjoint
from bilevel.methods.method import Level
from bilevel.micro_batches import MicroBatches
from bilevel.problems.protocols import BilevelProblem, has_symmetric_system, is_equation
from bilevel.results import Hypergradient, SolverInfo
from bilevel.spaces.array import Args, Array, H, P
from bilevel.spaces.rows import Rows
from bilevel.validation import (
    check_batches,
    check_inputs,
    check_like,
    check_problem,
    find_backend,
    wrong_calls_named,
)


def hypergradients(
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    inner_args: Args | list[Args] = (),
    outer_args: Args | list[Args] = (),
    solver: SolverSpec = "cg",
    adjoint0: P | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient[P, H]:
    """Return the hypergradients of Q outer objectives, the queries, of one inner problem.

    The result equals Q calls of `hypergradient`. The inner problem is linearized once, and the solver's preliminary
    work (a sketch, a step size) is done once. torch and JAX run the Q solves together, with products for all queries at
    once (``vmap``). In torch, a loss or solver with an operation that does not support ``vmap`` is solved for one query
    after the other, and so are all problems in NumPy. The memory is Q times the memory of one solve, plus Q times the
    values that one product computes. To limit it, call this function for parts of the queries.

    ``cg`` with a tolerance is block CG: each query uses the search directions of all queries, which saves most of the
    products. With ``damping="auto"``, all queries that need a damping have the same one. A query that the block cannot
    solve is solved again, for itself. Other solvers solve each query for itself.

    Args:
        problem: as in `hypergradient`. Its outer objective returns the values F_q of the queries as an array of shape
            (Q,). In NumPy, its ``grad`` returns stacked gradients.
        params, hparams, inner_args, backend, on_failure: as in `hypergradient`.
        outer_args: further arguments of the outer objective. If they are a list of Q tuples, each tuple is a query, and
            the outer objective returns a scalar. In JAX, they must have equal shapes and dtypes then.
        solver: a linear solver, as in `hypergradient`: any solver except ``unrolled``. A `WarmStart` is no solver here.
        adjoint0: warm starts for the Q solves: the ``adjoint`` of an earlier call.

    Returns:
        A `Hypergradient`. All leaves of ``grad`` and ``adjoint`` have a leading axis of length Q. ``value`` and the
        fields of ``info`` are arrays of shape (Q,). Outside ``jit``, the fields of ``info`` are NumPy arrays.

    Raises:
        TypeError, ValueError: for invalid input.
        SolverError: as in `hypergradient`. It names the queries whose solves failed.

    Warns:
        SolverWarning: if solves failed. There is one warning, which names their queries.
        InnerProblemWarning, DependenceWarning: as in `hypergradient`.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> class Entries:  # F_q = w_q
    ...     def __call__(self, w, lam): return w
    ...     def grad(self, w, lam): return np.eye(2), None
    >>> bl.hypergradients(bl.Problem(problem.inner, Entries()), np.zeros(2), np.zeros(2)).grad
    array([[1., 0.],
           [0., 1.]])
    """
    check_on_failure(on_failure)
    check_problem(problem)
    linear = get_linear_solver(solver, "hypergradients")
    if linear.stateful:
        raise TypeError(
            "bl.hypergradients: the solver is a WarmStart, which stores one adjoint. Pass adjoint0=hg.adjoint and a "
            "solver from bl.prepare."
        )
    if isinstance(outer_args, MicroBatches):
        raise TypeError(
            "bl.hypergradients: outer_args is a MicroBatches, which is one query. Pass a list with one entry per query."
        )
    backend = find_backend(backend, params, hparams)
    batches = check_inputs(backend, params, hparams, inner_args)
    first = check_batches(backend, "outer_args", outer_args)[0]
    with wrong_calls_named(problem, batches[0], first):
        hg = backend.run(_hypergradients, linear, problem, params, hparams, batches, outer_args, adjoint0)
    info = report_rows(
        backend, hg.info, hg.value, params, Implicit(linear), on_failure, symmetric=has_symmetric_system(problem)
    )
    if on_failure != "ignore":
        warn_if_not_kkt(backend, problem, params, hparams, batches[0], info)
    return hg._replace(params=params, info=info)


def _hypergradients(
    backend: Backend,
    solver: LinearSolver[Any],
    problem: BilevelProblem,
    params: P,
    hparams: H,
    batches: list[Args],
    outer_args: Args | list[Args],
    adjoint0: P | None,
) -> Hypergradient[Any, H]:
    outside, backend = backend, backend.by_rows
    if isinstance(outer_args, list):
        queries = _of_batches(backend, problem.outer, params, hparams, outer_args)
    else:
        queries = backend.outers(problem.outer, params, hparams, outer_args)
    values, cotangents, direct, of_outer = queries
    if adjoint0 is not None:
        check_like(backend, "adjoint0", adjoint0, "the stacked gradients of outer by params", cotangents)
    level = Level(backend, problem, params, hparams, batches)
    at = level.linearize()
    A = level.operator(at)
    rows = Rows(A.space, outside.space(cotangents), backend.batched)
    rhs = cotangents if at.reduction is None else backend.batched(at.rhs, cotangents)
    adjoints, info = run_solver_on_rows(solver, A, rhs, adjoint0, rows)

    def row(value: Array, cotangent: P, direct: H | None, adjoint: P, info: SolverInfo) -> Hypergradient[Any, H]:
        hg = combine(backend, value, direct, pull_back_adjoint(backend, A, at, cotangent, adjoint, info), hparams)
        return hg._replace(info=in_arrays(hg.info, value, A.space.xp))

    hg = backend.batched(row, values, cotangents, direct, adjoints, info)
    hg = hg._replace(info=hg.info._replace(kinks=hg.info.kinks + at.count_kinks(level.space)))
    names = EQUATION if is_equation(problem) else MINIMUM
    warn_of_dependence(backend, params, hparams, of_outer, at.dependence() if at.dependence else None, names)
    return hg


def _of_batches(backend: Backend, outer: Any, params: P, hparams: H, batches: list[Args]) -> OuterDerivatives[P, H]:
    """Differentiate an objective for each batch, and stack the results."""
    space, used = backend.space(params), []
    args = space.sequence(batches)

    def step(i: Any, _: None) -> tuple[Any, OuterDerivatives[P, H]]:
        found = backend.outer(outer, params, hparams, args(i))
        used.append(found.dependence)
        return i + 1, found._replace(dependence=None)

    rows = space.scan(step, 0, None, len(batches))[1]
    rows = stacked(backend, rows) if isinstance(rows, list) else rows  # an eager framework returns a list
    return rows._replace(dependence=used[0])
