"""What one call can hand on to the next: work that is done once, and a guess of the next adjoint."""

from typing import Any

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.hypergradient import SolverSpec
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import Implicit, as_method
from bilevel.methods.method import Level, Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import H, P
from bilevel.validation import check_inputs, check_like, check_stateless, find_backend


def prepare(
    solver: SolverSpec,
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    inner_args: tuple[object, ...] | list[tuple[object, ...]] = (),
    backend: Backend | str | None = None,
) -> LinearSolver[Any] | Method:
    """Return the solver with its preliminary work done, for several calls at about these params and hparams.

    It fixes what a solver otherwise computes at each call by products with the Hessian: the automatic step size of
    ``neumann`` and ``unrolled``, the sketch of ``nystrom``, the preconditioner of ``cg``. Other solvers come back
    unchanged. The result is right as long as the Hessian has not changed much: prepare again after some outer steps.

    Args:
        solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        problem: as in `hypergradient`; its outer objective is not evaluated.
        params: w, a tree of floating-point arrays.
        hparams: λ, a tree of floating-point arrays.
        inner_args: further arguments of L. Of a list of batches, the first is used.
        backend: a name or object; None: by the type of the arrays.

    Raises:
        TypeError, ValueError: for input that does not fit.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> float(bl.prepare("neumann", problem, np.zeros(2), np.zeros(2)).state)
    0.25
    """
    found = get_solver(solver)
    method = as_method(found)
    backend = find_backend(backend, params, hparams)
    batches = check_inputs(backend, params, hparams, inner_args)
    check_stateless(backend, found)
    state = backend.run(_init, method, problem, params, hparams, batches)
    prepared = method.with_state(state, backend.space(params).layout(params))
    return prepared.solver if isinstance(prepared, Implicit) else prepared


def _init(
    backend: Backend, method: Method, problem: BilevelProblem, params: P, hparams: H, batches: list[tuple[object, ...]]
) -> object:
    return method.init(Level(backend, problem, params, hparams, batches))


def extrapolate(adjoint: P, previous: P | None, *, backend: Backend | str | None = None) -> P:
    """Return 2·adjoint − previous: where the adjoint of the next outer step should be if it goes on as it went.

    A better warm start (``adjoint0``) than the last adjoint alone once the outer steps are small and regular.

    Args:
        adjoint: of the last call.
        previous: of the call before; None at the first step, which returns ``adjoint``.
        backend: a name or object; None: by the type of the arrays.

    Raises:
        TypeError, ValueError: if the two do not fit together.

    >>> import numpy as np
    >>> extrapolate(np.array([3.0]), np.array([1.0]))
    array([5.])
    """
    if previous is None:
        return adjoint
    backend = find_backend(backend, adjoint, previous, ("adjoint", "previous"))
    check_like(backend, "previous", previous, "adjoint", adjoint)
    space = backend.space(adjoint)
    return space.axpy(-1.0, previous, space.scale(2.0, adjoint))
