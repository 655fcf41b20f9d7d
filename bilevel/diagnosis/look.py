"""The numbers of a report at params and hparams, by two linearizations."""

from bilevel.backend import Backend
from bilevel.diagnosis.derivatives import Derivatives
from bilevel.diagnosis.measurements import PRODUCTS
from bilevel.linearization import Inputs
from bilevel.methods.method import Level
from bilevel.operators.lanczos import spectrum
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Array, H, P, V
from bilevel.spaces.space import Space

SEED = 3


def look(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]
) -> tuple[Derivatives[P, H], tuple[Array, ...]]:
    """Return the derivatives, and the numbers from one linearization."""
    params, hparams, args, outer_args = inputs
    _, outer_params, outer_hparams, _ = backend.outer(problem.outer, params, hparams, outer_args)
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
    zeros, cross = backend.space(hparams).zeros(), at.vjp_hparams(u)
    found = Derivatives(
        grad, Hu, zeros if cross is None else cross, outer_params, zeros if outer_hparams is None else outer_hparams
    )
    return found, (grad_norm, curvature, params_norm, asymmetry, *ends)


def look_again(
    backend: Backend,
    problem: BilevelProblem,
    inputs: Inputs[P, H],
    v: P,
    first: Derivatives[P, H],
    damping: float,
) -> tuple[Array, ...]:
    """Return F, its change, both residuals, and the changes within this linearization and since the first look."""
    params, hparams, inner_args, outer_args = inputs
    value, rhs, _, _ = backend.outer(problem.outer, params, hparams, outer_args)
    at = problem.linearize(backend, params, hparams, inner_args)
    space, hvp = backend.space(params), at.vjp_params
    u = space.normal(SEED)
    Hu, cross = hvp(u), at.vjp_hparams(u)
    undamped = space.subtract(rhs, hvp(v))
    left = space.axpy(-damping, v, undamped)
    residuals = (_ratio(space.norm(r), space.norm(rhs), space) for r in (left, undamped))
    new_cross = backend.space(hparams).zeros() if cross is None else cross
    pairs = ((Hu, hvp(u)), (first.product, Hu), (first.grad, at.residual), (first.cross, new_cross))
    changes = (_change(old, new, backend) for old, new in pairs)
    return value, -space.dot(v, at.residual), *residuals, *changes


def _change(old: V, new: V, backend: Backend) -> Array:
    """Return the norm of the change, relative to the larger norm."""
    space = backend.space(old)
    size = space.xp.maximum(space.norm(old), space.norm(new))
    return _ratio(space.norm(space.subtract(new, old)), size, space)


def _ratio(a: Array, b: Array, space: Space[V]) -> Array:
    """Return a / b, but 0 for 0 / 0, and infinity if only b is zero."""
    xp = space.xp
    return xp.where(b == 0, xp.where(a == 0, 0.0, float("inf")), a / xp.where(b == 0, 1.0, b))
