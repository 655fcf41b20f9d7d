"""Problems whose params solve an equation, and minimize nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel.problems.problem import check_functions
from bilevel.protocols import InnerDerivatives, NonSymmetric

if TYPE_CHECKING:
    from bilevel.protocols import Backend, Tree


@dataclass(frozen=True)
class FixedPoint:
    """Minimize ``outer(w*, λ)`` over λ, where ``w* = step(w*, λ)``.

    A deep equilibrium model (Bai, Kolter & Koltun, NeurIPS 2019), or a solver's or optimizer's step. At the fixed point

        dF/dλ = ∂F/∂λ + (∂step/∂λ)ᵀ v   with   (I − ∂step/∂w)ᵀ v = ∂F/∂w,

    which takes first derivatives of ``step`` alone. Where ``step`` is one of gradient descent on L, this is the
    hypergradient of the minimum of L. The system is not symmetric: use "gmres", "bicgstab", "exact", "neumann" with
    ``step_size=1.0``, which sums over ``terms`` steps back, or "identity", which takes the last one (Fung et al., AAAI
    2022). "unrolled" with ``step_size=1.0`` iterates ``step`` and differentiates through that.

    Args:
        step: (params, hparams, *inner_args) -> the next params, of the same structure, shapes and dtypes. For the numpy
            backend an object that has, besides ``__call__``, methods ``vjp_params(params, hparams, v, *args)`` and
            ``vjp_hparams(...)``, products of the transposed Jacobians with v; the latter may return None for zero.
        outer: F, as in `bilevel.Problem`.

    Raises:
        TypeError: if one of the two cannot be called.

    >>> import numpy as np, bilevel as bl
    >>> class Halve:  # w ← w/2 + λ, so that w* = 2λ
    ...     def __call__(self, w, lam): return w / 2 + lam
    ...     def vjp_params(self, w, lam, v): return v / 2
    ...     def vjp_hparams(self, w, lam, v): return v
    >>> problem = FixedPoint(Halve(), bl.problems.quadratic(np.eye(1), np.eye(1), target=np.zeros(1)).outer)
    >>> bl.hypergradient(problem, np.array([2.0]), np.array([1.0]), solver="exact").grad  # of F = w*²/2
    array([4.])
    """

    step: Callable[..., Any]
    outer: Callable[..., Any]

    def __post_init__(self) -> None:
        check_functions(self, step="the next params", outer="a scalar")

    def derivatives(self, backend: Backend, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> InnerDerivatives:
        """Differentiate w − step(w, λ) at a point."""
        space = backend.space
        stepped, pull, cross_pull, cross_push = backend.jacobian(self.step, params, hparams, args, role="step")

        def cross_vjp(v: Tree) -> Tree | None:
            product = cross_pull(v)
            return None if product is None else space.scale(-1.0, product)

        return InnerDerivatives(
            grad=space.axpy(-1.0, stepped, params),
            hvp=NonSymmetric(lambda v: space.axpy(-1.0, pull(v), v)),
            cross_vjp=cross_vjp,
            cross_jvp=None if cross_push is None else lambda u: space.scale(-1.0, cross_push(u)),
        )


@dataclass(frozen=True)
class Root:
    """Minimize ``outer(w*, λ)`` over λ, where ``residual(w*, λ) = 0``.

    At the root

        dF/dλ = ∂F/∂λ − (∂residual/∂λ)ᵀ v   with   (∂residual/∂w)ᵀ v = ∂F/∂w.

    The system is not symmetric: use solver "gmres", "bicgstab" or "exact". See also `FixedPoint`, which is the root of
    w − step(w, λ).

    Args:
        residual: (params, hparams, *inner_args) -> a tree like params. For the numpy backend an object as `FixedPoint`
            has it.
        outer: F, as in `bilevel.Problem`.

    Raises:
        TypeError: if one of the two cannot be called.
    """

    residual: Callable[..., Any]
    outer: Callable[..., Any]

    def __post_init__(self) -> None:
        check_functions(self, residual="a tree like params", outer="a scalar")

    def derivatives(self, backend: Backend, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> InnerDerivatives:
        """Differentiate the residual at a point."""
        found = backend.jacobian(self.residual, params, hparams, args, role="residual")
        return found._replace(hvp=NonSymmetric(found.hvp))
