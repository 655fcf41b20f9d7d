"""What one call can hand on to the next: work that is done once, and a guess of the next adjoint."""

from typing import Any

from bilevel.config import get_solver
from bilevel.linear_solvers.prepared import prepared
from bilevel.protocols import Backend, BilevelProblem, Point, Tree
from bilevel.validation import check_like, check_operator, check_point, find_backend


def prepare(
    solver: Any,
    problem: BilevelProblem,
    params: Tree,
    hparams: Tree,
    *,
    inner_args: tuple[Any, ...] = (),
    backend: Any = None,
) -> Any:
    """Return the solver with its preliminary work done, for several calls at about these params and hparams.

    Fixes what a solver otherwise finds out at each call, by products with the Hessian: the automatic step size of
    ``neumann``, the sketch of ``nystrom``, the preconditioner of ``cg``. Other solvers come back as they are. It
    holds as long as the Hessian has not moved much: prepare again every so many outer steps.

    Args:
        solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        problem: as in `hypergradient`; its outer objective is not evaluated.
        params: w, a tree of floating-point arrays.
        hparams: λ, likewise.
        inner_args: further arguments of L; of a list of batches, the first is used.
        backend: a name or object; None: by the type of the arrays.

    Raises:
        TypeError, ValueError: for input that does not fit.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> float(bl.prepare("neumann", problem, np.zeros(2), np.zeros(2)).step_size)
    0.25
    """
    solver = get_solver(solver)
    backend = find_backend(backend, params, hparams)
    point = Point(params, hparams, inner_args)
    check_point(backend, point)
    if not hasattr(solver, "prepare"):
        return solver
    return prepared(solver, backend.execute(_prepare, solver, problem, point))


def _prepare(backend: Backend, solver: Any, problem: BilevelProblem, point: Point) -> dict[str, Any]:
    hvp = problem.derivatives(backend, point.params, point.hparams, point.batches[0]).hvp
    check_operator(solver, hvp)
    return solver.prepare(hvp, point.params, backend.space)


def extrapolate(adjoint: Tree, previous: Tree | None, *, backend: Any = None) -> Tree:
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
    return backend.space.axpy(-1.0, previous, backend.space.scale(2.0, adjoint))
