"""Compare a hypergradient with a reference."""

from typing import Any, Literal, get_args

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.errors import suggest
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import H, P
from bilevel.testing.comparisons import Subject, against_differences, against_exact
from bilevel.testing.host import prepare

Reference = Literal["exact", "finite-differences"]


def check_hypergradient(
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    solver: SolverSpec = "cg",
    inner_args: tuple[object, ...] = (),
    outer_args: tuple[object, ...] = (),
    reference: Reference = "exact",
    rtol: float | None = None,
    atol: float | None = None,
    backend: Backend | str | None = None,
    seed: int = 0,
) -> None:
    """Raise an AssertionError with a table unless `bl.hypergradient` agrees with a reference.

    "exact" solves with the dense Hessian on the host: it checks the solver, leaf by leaf.
    "finite-differences" solves the inner problem again at λ ± h: it checks everything, the derivatives too,
    along random directions (over all of λ, and in each leaf) and the coordinates where the hypergradient is
    largest. It needs objectives that compute with the arrays they are handed, and is at its best in float64.

    How a solve ended is part of the message but decides nothing: what counts is the hypergradient. So a
    truncated method (``identity``, a short ``neumann``) fails here unless ``rtol`` allows for its bias.

    Args:
        problem, params, hparams, solver, inner_args, outer_args, backend: as in `bl.hypergradient`.
        reference: "exact" or "finite-differences". Both take up to 5,000 weights and any number of
            hyperparameters.
        rtol: tolerance relative to the norm of a leaf of the hypergradient g, or for a direction d to the
            typical size of d·g, (Σ dᵢ²gᵢ²)^½. Default: see `default_rtol`.
        atol: what is tolerated besides. Default: rtol/100 of the larger of ‖g‖ and ‖∂F/∂λ‖, since a solver's
            residual is relative to the whole, too: leaves and entries that are smaller still do not count.
            For finite differences, twice their noise is added.
        seed: of the random directions.

    Raises:
        AssertionError: if they differ, or the differences are too noisy to tell.
        TypeError, ValueError: for input that does not fit.
        SolverError: if the reference itself fails: a singular Hessian, an inner problem without solution.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> check_hypergradient(problem, np.zeros(2), np.zeros(2), solver="cg", reference="finite-differences")
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    if reference not in get_args(Reference):
        raise ValueError(f"reference: there is no {reference!r}." + suggest(reference, get_args(Reference)))
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}.")
    method = as_method(get_solver(solver))
    found, inputs = prepare(params, hparams, inner_args, outer_args, backend, f"the {reference} reference")
    hg = hypergradient(
        problem,
        params,
        hparams,
        inner_args=inner_args,
        outer_args=outer_args,
        solver=method,
        backend=found,
        on_failure="ignore",
    )
    eps = max(found.space(params).eps, found.space(hparams).eps)
    rtol = default_rtol(method, eps) if rtol is None else rtol
    # An unroll takes the hypergradient elsewhere.
    subject = Subject(found, problem, inputs._replace(params=hg.params), method, hg, rtol, atol)
    failure = against_exact(subject) if reference == "exact" else against_differences(subject, seed)
    if failure is not None:
        raise AssertionError(failure)


def default_rtol(solver: LinearSolver[Any] | Method, eps: float) -> float:
    """Return max(100 · the solver's own rtol, 10 √eps), at most ½.

    The condition number multiplies the solver's residual, and the rounding of products in the dtype.

    >>> default_rtol(get_solver("cg", rtol=1e-6), eps=2.0**-52)
    0.0001
    """
    return min(0.5, max(100 * float(solver.rtol), 10 * eps**0.5))
