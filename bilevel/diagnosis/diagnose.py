"""Measure what a hypergradient rests on."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import numpy as np

from bilevel.config import get_solver
from bilevel.diagnosis.agreement import compare, kind_of, nothing
from bilevel.diagnosis.measurements import PRODUCTS, Repetition
from bilevel.diagnosis.report import Diagnosis
from bilevel.hypergradient import hypergradient
from bilevel.operators.combinators import norm, residual
from bilevel.operators.lanczos import Spectrum, spectrum
from bilevel.protocols import (
    Backend,
    BilevelProblem,
    HypergradientMethod,
    NonSymmetric,
    Point,
    Scalar,
    Solver,
    Tree,
    VectorSpace,
)
from bilevel.validation import check_point, find_backend

SEED = 3


def diagnose(
    problem: BilevelProblem,
    params: Tree,
    hparams: Tree,
    *,
    inner_args: tuple[Any, ...] = (),
    outer_args: tuple[Any, ...] = (),
    solver: Any = "cg",
    backend: Any = None,
) -> Diagnosis:
    """Return a report on a hypergradient, to be printed: whether it can be trusted, why not, and what to do.

    It looks at whether the inner problem is solved, at the curvature, whether the losses repeat themselves, at the
    symmetry of the Hessian-vector products, every derivative against differences of what it is derived from, and the
    residual that the solver really leaves. What goes wrong in silence shows here: ``detach()`` in a forward pass,
    custom functions with a wrong second derivative, dropout left on, a mistake in a formula.

    Differences are taken in float64 on copies of everything, modules included, where the objectives can; else in the
    dtype there is, which the report says, and which may leave them too noisy to tell. A small batch of the data is
    enough. The whole takes about 30 Hessian-vector products (20 of them for the curvature), 15 gradients where all is
    well, at most 50, and the solve. In JAX, each of its seven functions compiles once per problem.

    Nothing that is passed in is changed: neither params, ``.grad``, modules and their buffers, nor the random states of
    the framework, NumPy and Python. (A ``torch.Generator`` or other state of the losses' own does move.)

    Args:
        problem, params, hparams, inner_args, outer_args, solver, backend: as in `bl.hypergradient`. Of a list of
            batches, all is measured on the first one, and there is no residual.

    Returns:
        A `Diagnosis`. ``ok`` tells whether nothing was found; ``findings`` and ``suggestions`` what; the other fields
        are the numbers.

    Raises:
        TypeError, ValueError, RuntimeError: for what `bl.hypergradient` refuses too, and within ``jit``.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> report = bl.diagnose(problem, np.array([1.0, 0.25]), np.ones(2))
    >>> report.ok, report.eigenvalues.largest
    (True, 4.0)
    >>> far = bl.diagnose(problem, np.array([3.0, 3.0]), np.ones(2))
    >>> [finding.name for finding in far.findings]
    ['not solved']
    """
    method = copy(get_solver(solver))  # a WarmStart must not learn from this
    found = find_backend(backend, params, hparams)
    point = Point(params, hparams, inner_args, outer_args)
    check_point(found, point)
    if found.to_host(found.space.max_abs(params)) is None:
        raise TypeError("bl.diagnose reads numbers: call it outside jit, grad and vmap.")
    with _random_state_kept():
        return _diagnose(found, method, problem, point)


def _diagnose(backend: Backend, solver: Solver, problem: BilevelProblem, point: Point) -> Diagnosis:
    def host(scalars: Any) -> list[float]:
        return [float(backend.to_host(x)) for x in scalars]

    batches = point.inner_args
    point = point._replace(inner_args=point.batches[0])
    with backend.aside(point, False):
        first, numbers = backend.execute(_look, None, problem, point)
        grad_norm, distance, asymmetry, *ends = host(numbers)
        hg = hypergradient(
            problem,
            point.params,
            point.hparams,
            inner_args=batches,
            outer_args=point.outer_args,
            solver=solver,
            backend=backend,
            on_failure="ignore",
        )
        again = point._replace(adjoint0=(hg.adjoint, first))
        value, change, left, undamped, *changes = host(backend.execute(_look_again, solver, problem, again))
    if isinstance(solver, HypergradientMethod) or batches is not point.inner_args:
        change = left = undamped = float("nan")
    kind = kind_of(problem)
    finite = np.isfinite([grad_norm, value, *(ends if kind != "equation" else ())]).all()
    return Diagnosis(
        curvature=kind,
        solver=solver,
        info=hg.info,
        residual=left,
        undamped_residual=undamped,
        value=value,
        change=change,
        grad_norm=grad_norm,
        distance=distance,
        eigenvalues=Spectrum(*ends),
        asymmetry=asymmetry,
        repetition=Repetition(*changes),
        derivatives=compare(backend, problem, point) if finite else nothing(problem, "nan or inf"),
        eps=backend.space.eps((point.params, point.hparams)),
    )


def _look(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Any, tuple[Scalar, ...]]:
    """Return (Hu, ∂L/∂w, cross product), and the numbers that one linearization yields."""
    space = backend.space
    xp, dot = space.xp, space.dot
    grad, hvp, cross_vjp, *_ = problem.derivatives(backend, point.params, point.hparams, point.inner_args)
    u, v = _directions(point.params, space)
    Hu = hvp(u)
    grad_norm, params_norm = norm(grad, space), norm(point.params, space)
    unit = space.scale(_ratio(xp.ones_like(grad_norm), grad_norm, space), grad)
    curvature = dot(unit, hvp(unit))
    if isinstance(hvp, NonSymmetric):
        asymmetry = xp.full_like(grad_norm, float("nan"))
        curvature, ends = xp.abs(curvature), [asymmetry] * 4
    else:
        size = norm(Hu, space) * norm(v, space) / space.size(v) ** 0.5
        asymmetry = _ratio(xp.abs(dot(u, hvp(v)) - dot(v, Hu)), size, space)
        ends = spectrum(hvp, grad, space, PRODUCTS)
    step = xp.where(curvature > 0, _ratio(grad_norm, curvature, space), float("inf"))
    distance = xp.where(grad_norm > 0, _ratio(step, params_norm, space), 0.0)
    return (Hu, grad, cross_vjp(u)), (grad_norm, distance, asymmetry, *ends)


def _look_again(backend: Backend, solver: Any, problem: BilevelProblem, point: Point) -> tuple[Scalar, ...]:
    """Return F, its change, both residuals, and the changes within this linearization and since the first look."""
    space, (v, first) = backend.space, cast("tuple[Tree, Any]", point.adjoint0)
    value, rhs, _ = backend.outer(problem.outer, point.params, point.hparams, point.outer_args)
    grad, hvp, cross_vjp, *_ = problem.derivatives(backend, point.params, point.hparams, point.inner_args)
    u, _ = _directions(point.params, space)
    Hu = hvp(u)
    undamped = residual(hvp, rhs, v, space)
    left = space.axpy(-getattr(solver, "damping", 0.0), v, undamped)
    residuals = (_ratio(norm(r, space), norm(rhs, space), space) for r in (left, undamped))
    changes = (
        _change(old, new, space) for old, new in zip((Hu, *first), (hvp(u), Hu, grad, cross_vjp(u)), strict=True)
    )
    return value, -space.dot(v, grad), *residuals, *changes


def _directions(like: Tree, space: VectorSpace) -> tuple[Tree, Tree]:
    return space.normal_like(like, SEED), space.normal_like(like, SEED + 1)


def _change(old: Tree | None, new: Tree | None, space: VectorSpace) -> Scalar:
    """Return the norm of the change, relative to the larger of both; None stands for zero."""
    if old is None or new is None:
        return space.xp.zeros(()) + (old is not new)
    size = space.xp.maximum(norm(old, space), norm(new, space))
    return _ratio(norm(space.axpy(-1.0, old, new), space), size, space)


def _ratio(a: Scalar, b: Scalar, space: VectorSpace) -> Scalar:
    """Return a / b; 0 for 0 / 0 and infinity where b alone is zero."""
    xp = space.xp
    return xp.where(b == 0, xp.where(a == 0, 0.0, float("inf")), a / xp.where(b == 0, 1.0, b))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put back the random states of Python and NumPy, which losses of any framework may use."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
