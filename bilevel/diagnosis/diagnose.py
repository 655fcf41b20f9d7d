"""Check a hypergradient."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.diagnosis.agreement import compare, nothing
from bilevel.diagnosis.measurements import PRODUCTS, Repetition
from bilevel.diagnosis.report import Diagnosis
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.linearization import Inputs
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Level, Method
from bilevel.operators.lanczos import Spectrum, spectrum
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args, Array, H, P, V
from bilevel.spaces.space import Space
from bilevel.validation import check_inputs, find_backend

SEED = 3


def diagnose(
    problem: BilevelProblem,
    params: object,
    hparams: object,
    *,
    inner_args: Args | list[Args] = (),
    outer_args: Args = (),
    solver: SolverSpec = "cg",
    backend: Backend | str | None = None,
) -> Diagnosis:
    """Return a report on a hypergradient, for printing: its errors, their causes, and remedies.

    The report checks whether the inner problem is solved and whether the losses are repeatable. It estimates the
    curvature and the symmetry of the Hessian-vector products. It compares each derivative with differences, and
    computes the true residual of the solver. So it finds errors without a symptom: ``detach()`` in a forward pass,
    custom functions with a wrong second derivative, active dropout, or a mistake in a formula.

    Differences are in float64, on copies of all arrays and modules, if the objectives support it. Otherwise they are in
    the dtype of the inputs, and may be too noisy. The report has the dtype. A small batch of the data is enough. The
    report takes about 30 Hessian-vector products (20 of them for the curvature), the solve, and 15 gradients if all is
    well, at most 50. In JAX, its seven functions compile once per problem.

    The call changes neither params, ``.grad``, modules and their buffers, nor the random states of the framework, NumPy
    and Python. Losses may change other states, such as a ``torch.Generator``.

    Args:
        problem, params, hparams, inner_args, outer_args, solver, backend: as in `bl.hypergradient`. With a list of
            batches, all measurements use the first batch, and there is no residual.

    Returns:
        A `Diagnosis`. ``ok`` is true if there are no ``findings``. The other fields are ``suggestions`` and numbers.

    Raises:
        TypeError, ValueError, RuntimeError: as in `bl.hypergradient`, and under ``jit``.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> report = bl.diagnose(problem, np.array([1.0, 0.25]), np.ones(2))
    >>> report.ok, report.eigenvalues.largest
    (True, 4.0)
    >>> far = bl.diagnose(problem, np.array([3.0, 3.0]), np.ones(2))
    >>> [finding.name for finding in far.findings]
    ['not solved']
    """
    method = as_method(copy(get_solver(solver)))  # a WarmStart must not change
    found = find_backend(backend, params, hparams)
    batches = check_inputs(found, params, hparams, inner_args, outer_args)
    if found.to_host(found.space(params).max_abs(params)) is None:
        raise TypeError("bl.diagnose reads numbers: call it outside jit, grad and vmap.")
    with _random_state_kept():
        return _diagnose(found, method, problem, Inputs(params, hparams, batches[0], outer_args), batches)


def _diagnose(
    backend: Backend, method: Method, problem: BilevelProblem, inputs: Inputs[P, H], batches: list[Args]
) -> Diagnosis:
    def host(scalars: Iterable[Array]) -> list[float]:
        return [float(backend.to_host(x)) for x in scalars]

    params, hparams, inner_args, outer_args = inputs
    with backend.isolated(inputs, False):
        first, numbers = backend.run(_look, problem, params, hparams, inner_args)
        grad_norm, distance, asymmetry, *ends = host(numbers)
        data: dict[str, Any] = {"inner_args": batches if len(batches) > 1 else inner_args, "outer_args": outer_args}
        hg = hypergradient(problem, params, hparams, **data, solver=method, backend=backend, on_failure="ignore")
        again = backend.run(_look_again, problem, inputs, hg.adjoint, first, method.damping)
        value, change, left, undamped, *changes = host(again)
    if method.differentiates_steps or len(batches) > 1:
        change = left = undamped = float("nan")
    finite = np.isfinite([grad_norm, value, *(ends if problem.kind != "equation" else ())]).all()
    return Diagnosis(
        curvature=problem.kind,
        method=method,
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
        derivatives=compare(backend, problem, inputs) if finite else nothing(problem, "nan or inf"),
        eps=max(backend.space(params).eps, backend.space(hparams).eps),
    )


def _look(
    backend: Backend, problem: BilevelProblem, params: P, hparams: H, args: Args
) -> tuple[tuple[P, P, H | None], tuple[Array, ...]]:
    """Return (Hu, ∂L/∂w, cross product), and the numbers from one linearization."""
    level = Level(backend, problem, params, hparams, [args])
    at = level.linearize()
    A, grad = level.operator(at), at.residual
    space, xp, dot = A.space, A.space.xp, A.space.dot
    u, v = space.normal(SEED), space.normal(SEED + 1)
    Hu = A(u)
    grad_norm, params_norm = space.norm(grad), space.norm(params)
    unit = space.scale(_ratio(xp.ones_like(grad_norm), grad_norm, space), grad)
    curvature = dot(unit, A(unit))
    if A.symmetric:
        size = space.norm(Hu) * space.norm(v) / space.size**0.5
        asymmetry = _ratio(xp.abs(dot(u, A(v)) - dot(v, Hu)), size, space)
        ends = spectrum(A, PRODUCTS)
    else:
        asymmetry = xp.full_like(grad_norm, float("nan"))
        curvature, ends = xp.abs(curvature), [asymmetry] * 4
    step = xp.where(curvature > 0, _ratio(grad_norm, curvature, space), float("inf"))
    distance = xp.where(grad_norm > 0, _ratio(step, params_norm, space), 0.0)
    return (Hu, grad, at.vjp_hparams(u)), (grad_norm, distance, asymmetry, *ends)


def _look_again(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], v: P, first: tuple[P, P, H | None], damping: float
) -> tuple[Array, ...]:
    """Return F, its change, both residuals, and the changes within this linearization and since the first look."""
    params, hparams, inner_args, outer_args = inputs
    value, rhs, *_ = backend.outer(problem.outer, params, hparams, outer_args)
    at = problem.linearize(backend, params, hparams, inner_args)
    space, hvp = backend.space(params), at.vjp_params
    u = space.normal(SEED)
    Hu = hvp(u)
    undamped = space.subtract(rhs, hvp(v))
    left = space.axpy(-damping, v, undamped)
    residuals = (_ratio(space.norm(r), space.norm(rhs), space) for r in (left, undamped))
    pairs = ((Hu, hvp(u)), (first[0], Hu), (first[1], at.residual), (first[2], at.vjp_hparams(u)))
    changes = (_change(old, new, backend) for old, new in pairs)
    return value, -space.dot(v, at.residual), *residuals, *changes


def _change(old: V | None, new: V | None, backend: Backend) -> Array:
    """Return the norm of the change, relative to the larger norm. None counts as zero."""
    if old is None or new is None:
        like = backend.space(new if old is None else old)
        return like.xp.zeros(()) + float(old is not new)
    space = backend.space(old)
    size = space.xp.maximum(space.norm(old), space.norm(new))
    return _ratio(space.norm(space.subtract(new, old)), size, space)


def _ratio(a: Array, b: Array, space: Space[V]) -> Array:
    """Return a / b, but 0 for 0 / 0, and infinity if only b is zero."""
    xp = space.xp
    return xp.where(b == 0, xp.where(a == 0, 0.0, float("inf")), a / xp.where(b == 0, 1.0, b))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random states of Python and NumPy, which losses of any framework may use."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
