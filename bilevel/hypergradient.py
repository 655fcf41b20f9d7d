"""Solve the inner problem's linearization, and combine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.backend import Backend
from bilevel.config import get_linear_solver, get_solver
from bilevel.convergence import OnFailure, check_on_failure, report
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.linearization import Linearization, LinearizedMap, NonSymmetric
from bilevel.methods.implicit import Implicit, as_method, pull_back
from bilevel.methods.method import Level, Method, Pullback
from bilevel.operators.lanczos import Spectrum, spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient, Status
from bilevel.spaces.array import Array, H, P
from bilevel.validation import check_inputs, check_like, check_stateless, check_trees, find_backend, leaf_names

SolverSpec = str | Path | Mapping[str, object] | LinearSolver[Any] | Method
"""A name, a TOML file, a mapping with ``name`` and options, or a solver object."""


def hypergradient(
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    inner_args: tuple[object, ...] | list[tuple[object, ...]] = (),
    outer_args: tuple[object, ...] = (),
    solver: SolverSpec = "cg",
    adjoint0: P | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient[P, H]:
    """Return dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w)ᵀ v, where (∂²L/∂w²) v = ∂F/∂w.

    The implicit function theorem at ``params``, which should minimize the inner objective L for ``hparams``
    (Lorraine, Vicol & Duvenaud, AISTATS 2020, theorem 1 and algorithm 2). Nothing that is passed in is changed, beyond
    what the objectives themselves do when they are evaluated (BatchNorm's statistics in train mode, dropout's draws).

    In JAX an eager call is compiled, and cached by the two functions and the solver: the objectives must be pure, and
    what they read beside their arguments (globals, attributes of ``self``) stays as it was when they were first traced.

    Args:
        problem: the inner objective L and the outer objective F; or a `FixedPoint` or a `Root`, which have an equation
            in place of ∂L/∂w = 0.
        params: w, a tree of floating-point arrays.
        hparams: λ, likewise, of the same framework.
        inner_args: further arguments of L, most often the training data, as a tuple. A list of such tuples is one
            batch per step, taken in turn, for ``neumann`` and ``unrolled``; in JAX their arrays must be alike.
        outer_args: further arguments of F, most often the validation data.
        solver: for v: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        adjoint0: a warm start for v: the ``adjoint`` of an earlier call.
        backend: a name or object; None: by the type of the arrays.
        on_failure: what to do unless the solve converged. "warn" raises all the same where the result is not
            finite. Under ``jit`` and ``vmap`` only ``info.status`` speaks.

    Returns:
        A `Hypergradient`: ``grad``, ``value``, ``adjoint``, ``params`` and ``info``.

    Raises:
        TypeError, ValueError: for input that does not fit; the message names the leaf. A fixed point or a root
            takes a solver that does not rely on symmetry.
        SolverError: if the solve failed and ``on_failure`` says so.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> bl.hypergradient(problem, np.zeros(2), np.zeros(2)).grad
    array([-1., -1.])
    """
    check_on_failure(on_failure)
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"problem: expected bl.Problem(inner, outer), bl.FixedPoint or bl.Root, got {type(problem).__name__}."
        )
    found = get_solver(solver)
    method = as_method(found)
    backend = find_backend(backend, params, hparams)
    batches = check_inputs(backend, params, hparams, inner_args, outer_args, adjoint0)
    check_stateless(backend, found)
    hg = backend.run(_hypergradient, method, problem, params, hparams, batches, outer_args, adjoint0)
    if hg.params is None:
        hg = hg._replace(params=params)
    symmetric = problem.kind != "equation"

    def curvature() -> Spectrum[Array]:
        return backend.run(_spectrum, problem, params, hparams, batches)

    hint = " bl.diagnose looks closer."
    info = report(backend, hg.info, method, on_failure, symmetric=symmetric, curvature=curvature, hint=hint)
    return hg._replace(info=info)  # pyright: ignore[reportReturnType]


def hypergradient_from(
    linearization: Linearization[P, H],
    *,
    solver: SolverSpec = "cg",
    adjoint0: P | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient[P | None, H]:
    """Return the hypergradient of a `Linearization` that was filled by hand.

    For those whose derivatives come from elsewhere (SciPy, scikit-learn, a paper's formulas).

    Args:
        linearization: F, its gradients, and the two products, at one point. Products are taken in the dtypes of
            ``grad_params``.
        solver: a linear solver: any but ``unrolled``, which needs the problem itself.
        adjoint0: a warm start for v.
        backend: a name or object; None: by the type of the arrays.
        on_failure: as in `hypergradient`.

    Returns:
        A `Hypergradient`; its ``params`` is None.

    Raises:
        TypeError, ValueError: for input that does not fit.
        SolverError: if the solve failed and ``on_failure`` says so.

    >>> import numpy as np, bilevel as bl
    >>> lin = bl.Linearization(
    ...     value=0.5, grad_params=np.array([1.0]), grad_hparams=None,
    ...     hvp=lambda v: 4.0 * v, cross_vjp=lambda v: 2.0 * v,
    ... )
    >>> bl.hypergradient_from(lin).grad
    array([-0.5])
    """
    check_on_failure(on_failure)
    linear_solver = get_linear_solver(solver, "hypergradient_from")
    if not isinstance(linearization, Linearization):
        fields = ", ".join(f"{field}=..." for field in Linearization._fields)
        raise TypeError(
            f"linearization: expected bl.Linearization({fields}), got an object of type {type(linearization).__name__}."
        )
    value, rhs, direct, hvp, cross_vjp = linearization
    if rhs is None:
        raise ValueError("grad_params is None: it is ∂F/∂w, and only grad_hparams may be None.")
    for name in ("hvp", "cross_vjp"):
        if not callable(product := getattr(linearization, name)):
            raise TypeError(
                f"{name}: expected a function, such as lambda v: A @ v of a matrix A, got {type(product).__name__}."
            )
    backend = find_backend(backend, rhs, direct, ("grad_params", "grad_hparams"))
    check_trees(
        backend, {"grad_params": rhs, "grad_hparams": direct, "adjoint0": adjoint0}, {"adjoint0": "grad_params"}
    )
    space = backend.space(rhs)
    unchecked = ["hvp(v)"]  # the first of all products is looked at

    def checked_hvp(v: P) -> P:
        found = hvp(v)
        while unchecked:
            check_like(backend, unchecked.pop(), found, "grad_params", rhs)
        return space.map(lambda _, entry: entry, rhs, found)

    A = LinearOperator(space, checked_hvp, symmetric=not isinstance(hvp, NonSymmetric))
    no_residual: Any = None
    at = LinearizedMap(no_residual, A.mv, cross_vjp)
    hg = combine(backend, value, direct, pull_back(backend, linear_solver, A, at, rhs, adjoint0), direct)
    info = report(
        backend, hg.info, Implicit(linear_solver), on_failure, symmetric=A.symmetric, curvature=lambda: spectrum(A)
    )
    return hg._replace(info=info)


def combine(
    backend: Backend, value: Array | float, direct: H | None, pulled: Pullback[P, H], hparams: H | None
) -> Hypergradient[Any, H]:
    """Add ∂F/∂λ to the pullback of ∂F/∂w, and flag a nan, which can enter by each of the two.

    Raises:
        ValueError: if λ has no influence, or if the two terms are unlike.
    """
    grad = direct if pulled.hparams is None else pulled.hparams
    if grad is None:
        raise ValueError(
            f"Neither F nor ∂L/∂w depends on {leaf_names(backend, 'hparams', hparams)}. Use the hparams argument "
            "inside inner or outer: values that are closed over, detached or converted to numbers cannot be "
            "differentiated."
        )
    space = backend.space(grad)
    if direct is not None and pulled.hparams is not None:
        check_like(backend, "cross_vjp(v)", pulled.hparams, "grad_hparams", direct)
        grad = space.axpy(1.0, pulled.hparams, direct)
    finite = space.isfinite((grad, value))
    status = space.xp.where(finite, pulled.info.status, int(Status.NON_FINITE))
    return Hypergradient(grad, value, pulled.adjoint, None, pulled.info._replace(status=status))


def _hypergradient(
    backend: Backend,
    method: Method,
    problem: BilevelProblem,
    params: P,
    hparams: H,
    batches: list[tuple[object, ...]],
    outer_args: tuple[object, ...],
    adjoint0: P | None,
) -> Hypergradient[P | None, H]:
    solution = method.solve(Level(backend, problem, params, hparams, batches), adjoint0)
    value, cotangent, direct = backend.outer(problem.outer, solution.params, hparams, outer_args)
    hg = combine(backend, value, direct, solution.pullback(cotangent), hparams)
    return hg if solution.params is params else hg._replace(params=solution.params)


def _spectrum(
    backend: Backend, problem: BilevelProblem, params: P, hparams: H, batches: list[tuple[object, ...]]
) -> Spectrum[Array]:
    level = Level(backend, problem, params, hparams, batches)
    return spectrum(level.operator(level.linearize()))
