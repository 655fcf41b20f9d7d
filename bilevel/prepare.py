"""Reuse work between calls: prepared solvers, and extrapolated adjoints."""

from typing import Any

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.hypergradient import SolverSpec
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import Implicit, as_method
from bilevel.methods.method import Level, Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args, P
from bilevel.validation import check_inputs, check_like, find_backend, wrong_calls_named


def prepare(
    solver: SolverSpec,
    problem: BilevelProblem,
    params: object,
    hparams: object,
    *,
    inner_args: Args | list[Args] = (),
    backend: Backend | str | None = None,
) -> LinearSolver[Any] | Method:
    """Return the solver with its preliminary work done, for several calls near these params and hparams.

    By default, a solver computes some values at each call by products with the Hessian. The result stores them: the
    automatic step size of ``neumann`` and ``unrolled``, the sketch of ``nystrom``, the preconditioner of ``cg``. Other
    solvers are returned unchanged. Prepare again after some outer steps, when the Hessian has changed.

    Args:
        solver, params, hparams, backend: as in `hypergradient`.
        problem: as in `hypergradient`. The outer objective is not evaluated.
        inner_args: further arguments of L. If they are a list of batches, only the first batch is used.

    Raises:
        TypeError, ValueError: for invalid input, or a `WarmStart`, which prepares its solver.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> float(bl.prepare("neumann", problem, np.zeros(2), np.zeros(2)).state)
    0.25
    """
    found = get_solver(solver)
    if found.stateful:
        raise TypeError("bl.prepare: the solver is a WarmStart, which prepares its solver: pass prepare_every= to it.")
    method = as_method(found)
    backend = find_backend(backend, params, hparams)
    batches = check_inputs(backend, params, hparams, inner_args)
    with wrong_calls_named(problem, batches[0], None):
        state = backend.run(_init, method, problem, params, hparams, batches)
    prepared = method.with_state(state, backend.space(params).layout(params))
    return prepared.solver if isinstance(prepared, Implicit) else prepared


def _init(
    backend: Backend, method: Method, problem: BilevelProblem, params: object, hparams: object, batches: list[Args]
) -> object:
    return method.init(Level(backend, problem, params, hparams, batches))


def extrapolate(adjoint: P, previous: P | None, *, backend: Backend | str | None = None) -> P:
    """Return 2·adjoint − previous, a linear extrapolation to the adjoint of the next outer step.

    If the outer steps are small and regular, it is a better warm start (``adjoint0``) than the last adjoint.

    Args:
        adjoint: the adjoint of the last call.
        previous: the adjoint of the call before. None, at the first step: return ``adjoint``.
        backend: as in `hypergradient`.

    Raises:
        TypeError, ValueError: if the two trees have different frameworks, structures or shapes.

    >>> import numpy as np
    >>> extrapolate(np.array([3.0]), np.array([1.0]))
    array([5.])
    """
    if previous is None:
        return adjoint
    backend = find_backend(backend, adjoint, previous, ("adjoint", "previous"))
    check_like(backend, "previous", previous, "adjoint", adjoint)
    space = backend.space(adjoint)
    return space.subtract(space.scale(2.0, adjoint), previous)
