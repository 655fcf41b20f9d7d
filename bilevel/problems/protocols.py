"""Protocols of bilevel problems and of their objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Literal, Protocol, runtime_checkable

from bilevel.linearization import LinearizedMap
from bilevel.spaces.array import Args, Array, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend

Kind = Literal["hessian", "gauss-newton", "finite-differences", "proximal", "constrained", "equation"]
"""The kind of (∂r/∂w)ᵀ: the Hessian of L, an approximation of it, or the transposed Jacobian of an equation.

"proximal" is an equation whose linear system has a symmetric form: see `bilevel.linearization.Reduction`.
"constrained" are KKT conditions, whose matrix is symmetric and indefinite.
"""
EQUATIONS: frozenset[Kind] = frozenset({"equation", "proximal", "constrained"})
"""The kinds of problems whose r is no gradient of an inner objective."""


@runtime_checkable
class BilevelProblem(Protocol):
    """An outer objective F and a map r(w, λ) whose zero is w*: `bl.Problem`, `bl.Proximal`, `bl.FixedPoint` etc.

    A problem is hashable and equals other problems of the same functions, so JAX compiles once for all of them.
    """

    @property
    def outer(self) -> Callable[..., object]: ...
    @property
    def kind(self) -> Kind:
        """The kind of (∂r/∂w)ᵀ."""
        ...

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate r at a point. ``args`` are the ``inner_args``."""
        ...

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[Array | None, P]:
        """Return L and r = ∂L/∂w. For an equation, return None and r."""
        ...


def is_equation(problem: BilevelProblem) -> bool:
    """Tell whether w* solves an equation, so that r is no gradient of an inner objective."""
    return problem.kind in EQUATIONS


def has_symmetric_system(problem: BilevelProblem) -> bool:
    """Tell whether the matrix of the linear system is symmetric."""
    return problem.kind != "equation"


def is_indefinite(problem: BilevelProblem) -> bool:
    """Tell whether the matrix of the linear system is indefinite at every solution."""
    return problem.kind == "constrained"


class InnerProblem(Protocol, Generic[P, H]):
    """An inner objective with analytic derivatives, for the numpy backend.

    ``vector`` and the results of ``grad`` and ``hvp`` have the structure of ``params``. The result of ``cross_vjp`` has
    the structure of ``hparams``. Forward mode of ``unrolled`` also needs a method
    ``cross_jvp(params, hparams, vector, *args)``, where the vector is like ``hparams`` and the result like ``params``.
    ``curvature="finite-differences"`` needs only ``grad`` (∂L/∂w) and ``grad_hparams`` (∂L/∂λ).
    """

    def __call__(self, params: P, hparams: H, *args: object) -> object: ...
    def grad(self, params: P, hparams: H, *args: object) -> P: ...
    def hvp(self, params: P, hparams: H, vector: P, *args: object) -> P: ...
    def cross_vjp(self, params: P, hparams: H, vector: P, *args: object) -> H: ...


class OuterObjective(Protocol, Generic[P, H]):
    """An outer objective with an analytic gradient, for the numpy backend.

    ``grad`` returns the pair (∂F/∂w, ∂F/∂λ). The second may be ``None`` for zero.
    """

    def __call__(self, params: P, hparams: H, *args: object) -> object: ...
    def grad(self, params: P, hparams: H, *args: object) -> tuple[P, H | None]: ...


class Constraint(Protocol, Generic[P, H]):
    """The equalities or inequalities of a `bl.Constrained` with analytic derivatives, for the numpy backend.

    The call returns c, an array with one entry for each constraint. ``multipliers`` has the shape of c, and ``vector``
    the structure of ``params``. Methods whose result is zero may return None, except ``jvp_params``.
    """

    def __call__(self, params: P, hparams: H, *args: object) -> Array: ...
    def jvp_params(self, params: P, hparams: H, vector: P, *args: object) -> Array:
        """Return (∂c/∂w) vector, with the shape of c."""
        ...

    def vjp_params(self, params: P, hparams: H, multipliers: Array, *args: object) -> P | None:
        """Return (∂c/∂w)ᵀ multipliers."""
        ...

    def vjp_hparams(self, params: P, hparams: H, multipliers: Array, *args: object) -> H | None:
        """Return (∂c/∂λ)ᵀ multipliers."""
        ...

    def hvp(self, params: P, hparams: H, multipliers: Array, vector: P, *args: object) -> P | None:
        """Return the Hessian by params of multipliers·c, times vector. It is zero if c is linear in params."""
        ...

    def cross_vjp(self, params: P, hparams: H, multipliers: Array, vector: P, *args: object) -> H | None:
        """Return the derivative by hparams of ((∂c/∂w)ᵀ multipliers)·vector."""
        ...
