"""Compute hypergradients."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.config import get_linear_solver, get_solver
from bilevel.convergence import OnFailure, check_on_failure, report, warn_if_not_kkt, warn_if_unsolved
from bilevel.dependence import EQUATION, MINIMUM, warn_of_dependence
from bilevel.inspection.derivatives import Derivatives
from bilevel.inspection.entries import entries
from bilevel.inspection.not_finite import described, find_not_finite, in_start, locate
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.linearization import Inputs, Linearization, LinearizedMap, NonSymmetric
from bilevel.methods.implicit import Implicit, as_method, pull_back
from bilevel.methods.method import Level, Method, Pullback
from bilevel.operators.lanczos import Spectrum, spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.protocols import BilevelProblem, has_symmetric_system, is_equation
from bilevel.results import Hypergradient, Status
from bilevel.spaces.array import Args, Array, H, P
from bilevel.validation import (
    check_inputs,
    check_like,
    check_problem,
    check_stateless,
    check_trees,
    find_backend,
    leaf_names,
    takes_problem,
    wrong_calls_named,
)

SolverSpec = str | Path | Mapping[str, object] | LinearSolver[Any] | Method
"""A name, a TOML file, a mapping with ``name`` and options, or a solver object."""


@takes_problem
def hypergradient(
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    inner_args: Args | list[Args] = (),
    outer_args: Args = (),
    solver: SolverSpec = "cg",
    adjoint0: P | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient[P, H]:
    """Return dF/dλ = ∂F/∂λ − (∂²L/∂λ∂w)ᵀ v, where (∂²L/∂w²) v = ∂F/∂w.

    It follows from the implicit function theorem (Lorraine, Vicol & Duvenaud, AISTATS 2020, theorem 1 and algorithm 2).
    ``params`` should minimize the inner objective L for ``hparams``. The call does not change its
    arguments, but objectives may (BatchNorm's statistics in train mode, random states by dropout).

    In JAX, an eager call is compiled, and cached by the two functions and the solver. The objectives must be pure.
    Other values that they read, such as globals and attributes of ``self``, keep the values of the first trace.

    Args:
        problem: the inner objective L and the outer objective F; a `Proximal` or `Projected`, for kinks, bounds and
            constraints; or a `FixedPoint` or `Root`, which have an equation in place of ∂L/∂w = 0.
        params: w, a tree of floating-point arrays.
        hparams: λ, a tree of floating-point arrays of the same framework.
        inner_args: further arguments of L, usually the training data, as a tuple. A list of tuples holds one batch per
            step, in a cycle, for ``neumann`` and ``unrolled``. In JAX, the batches must have equal shapes and dtypes.
            `MicroBatches` hold data in parts that are all used in each step, with the memory of one part.
        outer_args: further arguments of F, usually the validation data: a tuple or `MicroBatches`.
        solver: solver for v: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        adjoint0: a warm start for v: the ``adjoint`` of an earlier call.
        backend: a name or object. None: the backend of the arrays.
        on_failure: "warn", "raise" or "ignore" a failed solve. "warn" also raises if the result is not finite. Under
            ``jit`` and ``vmap``, only ``info.status`` reports failures.

    Returns:
        A `Hypergradient`: ``grad``, ``value``, ``adjoint``, ``params`` and ``info``.

    Raises:
        TypeError, ValueError: for invalid input; the message names the leaf. For example, a fixed point or a root needs
            a solver that does not rely on symmetry.
        SolverError: if the solve failed with ``on_failure="raise"``, or the result is not finite.

    Warns:
        SolverWarning: if the solve failed.
        InnerProblemWarning: if params are far from the solution of the inner problem, unless ``on_failure="ignore"``.
        DependenceWarning: if a leaf of hparams has no influence, or if objectives and arguments do not fit otherwise.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> bl.hypergradient(problem, np.zeros(2), np.zeros(2)).grad
    array([-1., -1.])
    """
    check_on_failure(on_failure)
    check_problem(problem)
    chosen = get_solver(solver)
    method = as_method(chosen)
    backend = find_backend(backend, params, hparams)
    batches = check_inputs(backend, params, hparams, inner_args, outer_args, adjoint0)
    check_stateless(backend, chosen)
    backend.check_settings(params, chosen, on_failure)
    with wrong_calls_named(problem, batches[0], outer_args):
        hg = backend.run(_hypergradient, method, problem, params, hparams, batches, outer_args, adjoint0)
    if hg.params is None:  # the method has not moved them
        hg = hg._replace(params=params)
    info = report(
        backend,
        hg.info,
        method,
        on_failure,
        symmetric=has_symmetric_system(problem),
        curvature=lambda: backend.run(_spectrum, problem, params, hparams, batches),
        locate=lambda: (
            in_start(backend, adjoint0)
            or backend.located(lambda own: locate(own, problem, Inputs(params, hparams, batches[0], outer_args)))
        ),
        hint=" Run bl.diagnose for details.",
    )
    if on_failure != "ignore":
        warn_if_unsolved(backend, hg.value, info, hg.params)
        warn_if_not_kkt(backend, problem, params, hparams, batches[0], info)
    return hg._replace(info=info)  # pyright: ignore[reportReturnType]


def hypergradient_from(
    linearization: Linearization[P, H],
    *,
    solver: SolverSpec = "cg",
    adjoint0: P | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Hypergradient[P | None, H]:
    """Return the hypergradient of a `Linearization` that is filled by the user.

    Use it with derivatives from SciPy, scikit-learn or formulas.

    Args:
        linearization: F, its gradients, and the two products, at one point. The results of ``hvp`` are cast to the
            dtypes of ``grad_params``.
        solver: a linear solver: any solver except ``unrolled``, which needs the problem itself.
        adjoint0, backend, on_failure: as in `hypergradient`.

    Returns:
        A `Hypergradient`; its ``params`` is None.

    Raises:
        TypeError, ValueError, SolverError: as in `hypergradient`.

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
        raise ValueError("grad_params is None: pass ∂F/∂w. Only grad_hparams may be None.")
    if shape := np.shape(value):
        raise ValueError(f"value: expected the number F(w, λ), got an array or a list of shape {shape}.")
    for name in ("hvp", "cross_vjp"):
        if not callable(product := getattr(linearization, name)):
            raise TypeError(f"{name}: expected a function, such as lambda v: A @ v, got {type(product).__name__}.")
    backend = find_backend(backend, rhs, direct, ("grad_params", "grad_hparams"))
    trees = {"grad_params": rhs, "grad_hparams": direct, "adjoint0": adjoint0}
    check_trees(backend, trees, {"adjoint0": "grad_params"})
    space = backend.space(rhs)

    def checked(name: str, of: Callable[[P], P]) -> Callable[[P], P]:
        def call(v: P) -> P:
            product = of(v)
            check_like(backend, f"{name}(v)", product, "grad_params", rhs)
            return space.map(lambda _, entry: entry, rhs, product)  # casts to the dtypes of rhs

        return call

    transpose = hvp.transpose if isinstance(hvp, NonSymmetric) else None
    A = LinearOperator(
        space,
        checked("hvp", hvp),
        symmetric=not isinstance(hvp, NonSymmetric),
        transpose=None if transpose is None else checked("hvp.transpose", transpose),
    )
    no_residual: Any = None
    at = LinearizedMap(no_residual, A.mv, cross_vjp)
    pulled = pull_back(backend, linear_solver, A, at, rhs, adjoint0)
    if direct is None and pulled.hparams is None:
        raise ValueError(
            "Neither F nor ∂L/∂w depends on hparams: grad_hparams is None, and cross_vjp(v) has returned None."
        )
    hg = combine(backend, value, direct, pulled, direct)

    def locate_here() -> str:
        if start := in_start(backend, adjoint0):
            return start
        u = space.normal(1)
        found = Derivatives(None, A(u), cross_vjp(u), rhs, direct)
        number = float(backend.to_host(hg.value) if backend.owns(hg.value) else hg.value)
        return described(find_not_finite(backend, {}, None, number, entries(backend, found)))

    info = report(
        backend,
        hg.info,
        Implicit(linear_solver),
        on_failure,
        symmetric=A.symmetric,
        curvature=lambda: spectrum(A),
        locate=locate_here,
    )
    return hg._replace(info=info)


def combine(
    backend: Backend, value: Array | float, direct: H | None, pulled: Pullback[P, H], hparams: H | None
) -> Hypergradient[Any, H]:
    """Add the direct term ∂F/∂λ to the pullback of ∂F/∂w. A nan in the sum or in F sets the status ``NON_FINITE``.

    ``hparams`` is for messages. Raise a ValueError if nothing depends on λ, or if the two terms have different
    structures or shapes.
    """
    grad = direct if pulled.hparams is None else pulled.hparams
    if grad is None:
        raise ValueError(
            f"Neither F nor ∂L/∂w depends on {leaf_names(backend, 'hparams', hparams)}. Use the hparams argument "
            "inside inner or outer. Values that are closed over, detached or converted to numbers have no derivative."
        )
    space = backend.space(grad)
    if direct is not None and pulled.hparams is not None:
        check_like(backend, "cross_vjp(v)", pulled.hparams, "grad_hparams", direct)
        grad = space.axpy(1.0, pulled.hparams, direct)
    status = space.xp.where(space.isfinite((grad, value)), pulled.info.status, int(Status.NON_FINITE))
    return Hypergradient(grad, value, pulled.adjoint, None, pulled.info._replace(status=status))


def _hypergradient(
    backend: Backend,
    method: Method,
    problem: BilevelProblem,
    params: P,
    hparams: H,
    batches: list[Args],
    outer_args: Args,
    adjoint0: P | None,
) -> Hypergradient[P | None, H]:
    solution = method.solve(Level(backend, problem, params, hparams, batches), adjoint0)
    value, cotangent, direct, of_outer = backend.outer(problem.outer, solution.params, hparams, outer_args)
    pulled = solution.pullback(cotangent)
    hg = combine(backend, value, direct, pulled, hparams)
    names = EQUATION if is_equation(problem) else MINIMUM
    warn_of_dependence(backend, params, hparams, of_outer, pulled.dependence, names)
    # Compiled code would return a copy of params that have not moved.
    return hg if solution.params is params else hg._replace(params=solution.params)


def _spectrum(
    backend: Backend, problem: BilevelProblem, params: object, hparams: object, batches: list[Args]
) -> Spectrum[Array]:
    level = Level(backend, problem, params, hparams, batches)
    at = level.linearize()
    return spectrum(level.operator(at), project=at.rhs)
