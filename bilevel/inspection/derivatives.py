"""The first and second derivatives of a problem at one point."""

from typing import Generic, NamedTuple

from bilevel.backend import Backend
from bilevel.linearization import Inputs, LinearizedMap
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Array, H, P

DERIVATIVES = ("inner grad", "inner hvp", "inner cross_vjp", "outer grad_params", "outer grad_hparams")


class Derivatives(NamedTuple, Generic[P, H]):
    """The derivatives in the order of `DERIVATIVES`, with zeros where an objective does not depend on λ.

    Attributes:
        grad: ∂L/∂w, or the residual of an equation.
        product: (∂²L/∂w²) u for one vector u.
        cross: (∂²L/∂λ∂w)ᵀ u.
        outer_params, outer_hparams: ∂F/∂w and ∂F/∂λ.
    """

    grad: P
    product: P
    cross: H
    outer_params: P
    outer_hparams: H


def linearized(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], u: P
) -> tuple[LinearizedMap[P, H], Array, Derivatives[P, H]]:
    """Return the linearized inner problem, F, and the derivatives. ``u`` is a vector like params."""
    params, hparams, inner_args, outer_args = inputs
    value, outer_params, outer_hparams, _ = backend.outer(problem.outer, params, hparams, outer_args)
    at = problem.linearize(backend, params, hparams, inner_args)
    zeros, cross = backend.space(hparams).zeros(), at.vjp_hparams(u)
    found = Derivatives(
        grad=at.residual,
        product=at.vjp_params(u),
        cross=zeros if cross is None else cross,
        outer_params=outer_params,
        outer_hparams=zeros if outer_hparams is None else outer_hparams,
    )
    return at, value, found


def derivatives(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], u: P) -> Derivatives[P, H]:
    """Return the derivatives. ``u`` is a vector like params."""
    return linearized(backend, problem, inputs, u)[2]


def inner_value(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> Array:
    """Return the inner objective; 0 for an equation."""
    value, _ = problem.value_and_residual(backend, inputs.params, inputs.hparams, inputs.inner_args)
    space = backend.space(inputs.params)
    return space.norm(space.zeros()) if value is None else value
