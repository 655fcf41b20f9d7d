"""Linearize, solve, combine."""

from functools import partial
from typing import Any

from bilevel.config import get_solver
from bilevel.convergence import UNKNOWN, OnFailure, check_on_failure, conclude
from bilevel.operators.lanczos import Spectrum, spectrum
from bilevel.protocols import (
    Backend,
    BilevelProblem,
    HypergradientMethod,
    Linearization,
    NonSymmetric,
    Operator,
    Point,
    Solver,
    Stochastic,
    Tree,
    same_kind,
)
from bilevel.results import Hypergradient, Status
from bilevel.validation import (
    check_like,
    check_operator,
    check_point,
    check_prepared,
    check_trees,
    find_backend,
    leaf_names,
)


def hypergradient(
    problem: BilevelProblem,
    params: Tree,
    hparams: Tree,
    *,
    inner_args: tuple[Any, ...] | list[tuple[Any, ...]] = (),
    outer_args: tuple[Any, ...] = (),
    solver: Any = "cg",
    adjoint0: Tree | None = None,
    backend: Any = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
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
    solver = get_solver(solver)
    backend = find_backend(backend, params, hparams)
    point = Point(params, hparams, inner_args, outer_args, adjoint0)
    check_point(backend, point)
    check_prepared(backend, solver, "params", params)
    hg: Hypergradient = backend.execute(_hypergradient, solver, problem, point)
    if hg.params is None:
        hg = hg._replace(params=params)
    ends = partial(backend.execute, _spectrum, solver, problem, point)
    info = conclude(backend, hg.info, solver, on_failure, ends, " bl.diagnose looks closer.")
    return hg._replace(info=info)


def hypergradient_from(
    linearization: Linearization,
    *,
    solver: Any = "cg",
    adjoint0: Tree | None = None,
    backend: Any = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient:
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
    solver = get_solver(solver)
    if isinstance(solver, HypergradientMethod):
        raise TypeError(f"{type(solver).__name__} needs the problem itself: use bl.hypergradient.")
    if not isinstance(linearization, Linearization):
        fields = ", ".join(f"{field}=..." for field in Linearization._fields)
        raise TypeError(
            f"linearization: expected bl.Linearization({fields}), got an object of type {type(linearization).__name__}."
        )
    _, rhs, direct, hvp, _ = linearization
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

    check_prepared(backend, solver, "grad_params", rhs)

    unchecked = ["hvp(v)"]  # the first of all products is looked at

    def checked(product: Operator) -> Operator:
        def checked_hvp(v: Tree) -> Tree:
            found = product(v)
            while unchecked:
                check_like(backend, unchecked.pop(), found, "grad_params", rhs)
            return backend.space.map(lambda _, entry: entry, rhs, found)

        return checked_hvp

    linearization = linearization._replace(hvp=same_kind(hvp, checked))
    hg = _check_result(implicit(backend, solver, linearization, adjoint0), backend, direct)
    info = conclude(backend, hg.info, solver, on_failure, lambda: _ends(backend, linearization))
    return hg._replace(info=info)


def linearize(backend: Backend, problem: BilevelProblem, point: Point) -> Linearization:
    """Return the linearization of a problem at a point; of several batches, the first one serves but for products."""
    linearization = backend.linearize(
        problem, point.params, point.hparams, inner_args=point.batches[0], outer_args=point.outer_args
    )
    if len(point.batches) == 1:
        return linearization
    if isinstance(linearization.hvp, NonSymmetric):
        raise TypeError("inner_args is a list, but a fixed point or a root is one of all the data: give one tuple.")
    args = backend.space.sequence(point.batches)

    def sample(i: Any) -> Operator:
        return problem.derivatives(backend, point.params, point.hparams, args(i + 1)).hvp

    return linearization._replace(hvp=Stochastic(linearization.hvp, sample))


def implicit(backend: Backend, solver: Any, linearization: Linearization, adjoint0: Tree | None) -> Hypergradient:
    """Solve for the adjoint and combine: where an `IHVPSolver` becomes a `HypergradientMethod`."""
    space = backend.space
    value, rhs, direct, hvp, cross_vjp = linearization
    check_operator(solver, hvp)
    adjoint, info = solver.solve(hvp, rhs, adjoint0, space)
    indirect = cross_vjp(adjoint)
    grad = direct
    if indirect is not None:
        if direct is not None:
            check_like(backend, "cross_vjp(v)", indirect, "grad_hparams", direct)
        grad = space.scale(-1.0, indirect) if direct is None else space.axpy(-1.0, indirect, direct)
    return Hypergradient(grad, value, adjoint, None, info)


def _hypergradient(backend: Backend, solver: Solver, problem: BilevelProblem, point: Point) -> Hypergradient:
    if isinstance(solver, HypergradientMethod):
        hg = solver.hypergradient(backend, problem, point)
    else:
        hg = implicit(backend, solver, linearize(backend, problem, point), point.adjoint0)
    return _check_result(hg, backend, point.hparams)


def _check_result(hg: Hypergradient, backend: Backend, hparams: Tree) -> Hypergradient:
    """Raise if λ has no influence; flag a nan, which can enter by the cross product or the direct gradient too."""
    if hg.grad is None:
        raise ValueError(
            f"Neither F nor ∂L/∂w depends on {leaf_names(backend, 'hparams', hparams)}. Use the hparams argument "
            "inside inner or outer: values that are closed over, detached or converted to numbers cannot be "
            "differentiated."
        )
    xp = backend.space.xp
    finite = backend.space.isfinite((hg.grad, hg.value))
    return hg._replace(info=hg.info._replace(status=xp.where(finite, hg.info.status, int(Status.NON_FINITE))))


def _spectrum(backend: Backend, solver: Solver, problem: BilevelProblem, point: Point) -> Spectrum | None:
    return _ends(backend, linearize(backend, problem, point))


def _ends(backend: Backend, linearization: Linearization) -> Spectrum | None:
    if backend.collective:
        return UNKNOWN
    if isinstance(linearization.hvp, NonSymmetric):
        return None
    return spectrum(linearization.hvp, linearization.grad_params, backend.space)
