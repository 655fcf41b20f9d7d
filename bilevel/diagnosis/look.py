"""The numbers of a report at params and hparams, by two linearizations."""

from bilevel.backend import Backend
from bilevel.diagnosis.measurements import PRODUCTS
from bilevel.inspection.derivatives import Derivatives, inner_value, linearized
from bilevel.linearization import Inputs
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.protocols import BilevelProblem, has_symmetric_system, is_equation
from bilevel.spaces.array import Array, H, P, V
from bilevel.spaces.space import Space

SEED = 3


def look(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]
) -> tuple[Derivatives[P, H], P, tuple[Array, ...]]:
    """Return the derivatives, the entries at a kink of a proximal step, and the numbers, from one linearization."""
    space = backend.space(inputs.params)
    u, v = space.normal(SEED), space.normal(SEED + 1)
    at, _, found = linearized(backend, problem, inputs, u)
    A = LinearOperator(space, at.product, symmetric=has_symmetric_system(problem))
    xp, dot, grad, params = space.xp, space.dot, found.grad, inputs.params
    grad_norm, params_norm = space.norm(grad), space.norm(params)
    unit = space.scale(_ratio(xp.ones_like(grad_norm), grad_norm, space), grad)
    curvature = dot(unit, at.vjp_params(unit))
    if is_equation(problem):
        curvature = xp.abs(curvature)
    if A.symmetric:
        Hu = found.product if at.reduction is None else A(u)
        size = space.norm(Hu) * space.norm(v) / space.size**0.5
        asymmetry = _ratio(xp.abs(dot(u, A(v)) - dot(v, Hu)), size, space)
        ends = spectrum(A, PRODUCTS, project=at.rhs)
    else:
        asymmetry = xp.full_like(grad_norm, float("nan"))
        ends = [asymmetry] * 4
    kinks = space.zeros() if at.reduction is None else at.reduction.kinks()
    return found, kinks, (grad_norm, curvature, params_norm, asymmetry, *ends)


def look_again(
    backend: Backend,
    problem: BilevelProblem,
    inputs: Inputs[P, H],
    v: P,
    first: Derivatives[P, H],
    damping: float,
) -> tuple[Array, ...]:
    """Return L, F, its change, both residuals, and the changes within this linearization and since the first look."""
    space = backend.space(inputs.params)
    u = space.normal(SEED)
    at, value, again = linearized(backend, problem, inputs, u)
    rhs, hvp = at.rhs(again.outer_params), at.vjp_params
    undamped = space.subtract(rhs, at.product(v))
    left = space.axpy(-damping, v, undamped)
    residuals = (_ratio(space.norm(r), space.norm(rhs), space) for r in (left, undamped))
    grad, product, cross = (_change(old, new, backend) for old, new in zip(first[:3], again[:3], strict=True))
    changes = (_change(again.product, hvp(u), backend), product, grad, cross)
    change = -space.dot(at.adjoint(v, again.outer_params), at.residual)
    return inner_value(backend, problem, inputs), value, change, *residuals, *changes


def _change(old: V, new: V, backend: Backend) -> Array:
    """Return the norm of the change, relative to the larger norm."""
    space = backend.space(old)
    size = space.xp.maximum(space.norm(old), space.norm(new))
    return _ratio(space.norm(space.subtract(new, old)), size, space)


def _ratio(a: Array, b: Array, space: Space[V]) -> Array:
    """Return a / b, but 0 for 0 / 0, and infinity if only b is zero."""
    xp = space.xp
    return xp.where(b == 0, xp.where(a == 0, 0.0, float("inf")), a / xp.where(b == 0, 1.0, b))
