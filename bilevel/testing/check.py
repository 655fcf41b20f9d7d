"""Compare a hypergradient with a reference."""

from typing import Any, Literal, get_args

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Method
from bilevel.options import check_choice
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args
from bilevel.testing.comparisons import Subject, against_differences, against_exact
from bilevel.testing.host import check_damping, prepare
from bilevel.testing.retraining import Fit, check_retraining

Reference = Literal["exact", "finite-differences", "retraining"]


def check_hypergradient(
    problem: BilevelProblem,
    params: object,
    hparams: object,
    *,
    solver: SolverSpec = "cg",
    inner_args: Args = (),
    outer_args: Args = (),
    reference: Reference = "exact",
    damping: float = 0.0,
    fit: Fit | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    backend: Backend | str | None = None,
    seed: int = 0,
) -> None:
    """Raise an AssertionError with a table unless `bl.hypergradient` agrees with a reference.

    "exact" solves with the dense Hessian on the host and checks the solver, leaf by leaf. "finite-differences" solves
    the inner problem again at λ ± h and also checks the derivatives. It compares along random directions (over all of
    λ, and in each leaf) and at the coordinates of the largest entries of the hypergradient. "retraining" takes the same
    differences with your training, ``fit``. The objectives must compute with the arrays that are passed. Use float64
    for the best accuracy.

    The message contains the status of the solve, but the check compares only hypergradients. So a truncated method
    (``identity``, a short ``neumann``) fails unless ``rtol`` allows for its bias.

    Args:
        problem, params, hparams, solver, inner_args, outer_args, backend: as in `bl.hypergradient`.
        reference: "exact", "finite-differences" or "retraining". All take up to 5,000 weights and any number of
            hyperparameters.
        damping: added to the Hessian of the reference. Pass the damping of the solver to check a damped solve at any
            params, for example of an untrained network. Without it, the bias of a damped solve counts as an error.
        fit: for "retraining": ``fit(hparams, params0) -> params``, as in `bl.minimize`, with a fixed seed. It is called
            about 14 times for each of at most 11 directions. Its error is noise in the differences.
        rtol: tolerance relative to the norm of a leaf of the hypergradient g. For a direction d, relative to the
            typical size of d·g, (Σ dᵢ²gᵢ²)^½. Default: see `default_rtol`.
        atol: absolute tolerance, added to the relative tolerance. Default: rtol/100 of the larger of ‖g‖ and ‖∂F/∂λ‖,
            because a solver's residual is relative to all leaves: smaller leaves and entries do not count. For finite
            differences, twice their noise is added.
        seed: the seed of the random directions.

    Raises:
        AssertionError: if the hypergradients differ, or the differences are too noisy.
        TypeError, ValueError: for invalid input, and for "retraining" without ``fit`` or with damping.
        SolverError: if the reference fails: for a singular Hessian, or an inner problem without a solution.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> check_hypergradient(problem, np.zeros(2), np.zeros(2), solver="cg", reference="finite-differences")
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    check_choice("reference", reference, get_args(Reference))
    check_retraining(fit, damping)
    if (fit is not None) != (reference == "retraining"):
        raise ValueError('fit: pass fit= and reference="retraining" together.')
    check_damping(damping)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}.")
    method = as_method(get_solver(solver))
    found, inputs = prepare(params, hparams, inner_args, outer_args, backend, f"the {reference} reference")
    hg = hypergradient(problem, **inputs._asdict(), solver=method, backend=found, on_failure="ignore")
    eps = max(found.space(params).eps, found.space(hparams).eps)
    rtol = default_rtol(method, eps) if rtol is None else rtol
    # An unrolled method evaluates the hypergradient at other params.
    subject = Subject(found, problem, inputs._replace(params=hg.params), method, hg, rtol, atol, damping, fit)
    failure = against_exact(subject) if reference == "exact" else against_differences(subject, seed)
    if failure is not None:
        raise AssertionError(failure)


def default_rtol(solver: LinearSolver[Any] | Method, eps: float) -> float:
    """Return max(100 · the solver's rtol, 10 √eps), at most ½.

    The condition number multiplies the solver's residual and the rounding errors of products.

    >>> default_rtol(get_solver("cg", rtol=1e-6), eps=2.0**-52)
    0.0001
    """
    return min(0.5, max(100 * float(solver.rtol or 0.0), 10 * eps**0.5))
