"""Problems whose params solve an equation and minimize no objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bilevel.linearization import LinearizedMap
from bilevel.problems.problem import check_functions
from bilevel.problems.protocols import Kind
from bilevel.spaces.array import Args, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend


class _Equation:
    """A problem whose w* solves an equation r(w, λ) = 0 and minimizes no objective."""

    @property
    def kind(self) -> Kind:
        """The kind of (∂r/∂w)ᵀ: a transposed Jacobian, which need not be symmetric."""
        return "equation"

    @abstractmethod
    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate r at a point."""
        raise NotImplementedError

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[None, P]:
        """Return None, since there is no objective, and r."""
        return None, self.linearize(backend, params, hparams, args).residual


@dataclass(frozen=True)
class FixedPoint(_Equation):
    """Minimize ``outer(w*, λ)`` over λ, where ``w* = step(w*, λ)``.

    ``step`` is a deep equilibrium model (Bai, Kolter & Koltun, NeurIPS 2019), or a step of a solver or optimizer. At
    the fixed point

        dF/dλ = ∂F/∂λ + (∂step/∂λ)ᵀ v   with   (I − ∂step/∂w)ᵀ v = ∂F/∂w.

    This needs only first derivatives of ``step``. If ``step`` is a step of gradient descent on L, the result is the
    hypergradient at the minimum of L. The system is not symmetric: use "gmres", "bicgstab" or "exact". "neumann" with
    ``step_size=1.0`` sums over the last ``terms`` steps, and "identity" uses only the last step (Fung et al., AAAI
    2022). "unrolled" with ``step_size=1.0`` iterates ``step`` and differentiates the iteration.

    Args:
        step: (params, hparams, *inner_args) -> the next params, with the same structure, shapes and dtypes. For the
            numpy backend, an object that also has the methods ``vjp_params(params, hparams, v, *args)`` and
            ``vjp_hparams(...)``: products of the transposed Jacobians with v. ``vjp_hparams`` may return None for zero.
            "normal-cg" also needs ``jvp_params``: (∂step/∂w) v.
        outer: F, as in `bilevel.Problem`.

    Raises:
        TypeError: if ``step`` or ``outer`` cannot be called.

    >>> import numpy as np, bilevel as bl
    >>> class Halve:  # w ← w/2 + λ, so that w* = 2λ
    ...     def __call__(self, w, lam): return w / 2 + lam
    ...     def vjp_params(self, w, lam, v): return v / 2
    ...     def vjp_hparams(self, w, lam, v): return v
    >>> problem = FixedPoint(Halve(), bl.problems.quadratic(np.eye(1), np.eye(1), target=np.zeros(1)).outer)
    >>> bl.hypergradient(problem, np.array([2.0]), np.array([1.0]), solver="exact").grad  # of F = w*²/2
    array([4.])
    """

    step: Callable[..., object]
    outer: Callable[..., object]

    def __post_init__(self) -> None:
        check_functions(self, step="the next params", outer="a scalar")

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate w − step(w, λ) at a point."""
        return distance(backend, params, hparams, backend.jacobian(self.step, params, hparams, args, label="step"))


@dataclass(frozen=True)
class Root(_Equation):
    """Minimize ``outer(w*, λ)`` over λ, where ``residual(w*, λ) = 0``.

    At the root

        dF/dλ = ∂F/∂λ − (∂residual/∂λ)ᵀ v   with   (∂residual/∂w)ᵀ v = ∂F/∂w.

    The system is not symmetric: use solver "gmres", "bicgstab" or "exact". A `FixedPoint` is a root of w − step(w, λ).

    Args:
        residual: (params, hparams, *inner_args) -> a tree like params. For the numpy backend, an object with the
            methods that `FixedPoint` describes.
        outer: F, as in `bilevel.Problem`.

    Raises:
        TypeError: if ``residual`` or ``outer`` cannot be called.
    """

    residual: Callable[..., object]
    outer: Callable[..., object]

    def __post_init__(self) -> None:
        check_functions(self, residual="a tree like params", outer="a scalar")

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate the residual at a point."""
        return of_hparams_only(backend.jacobian(self.residual, params, hparams, args, label="residual"))


def distance(backend: Backend, params: P, hparams: H, step: LinearizedMap[P, H]) -> LinearizedMap[P, H]:
    """Return the linearized map w − step(w, λ)."""
    of_params, of_hparams = backend.space(params), backend.space(hparams)
    cross_push, push = step.jvp_hparams, step.jvp_params

    def vjp_hparams(v: P) -> H | None:
        product = step.vjp_hparams(v)
        return None if product is None else of_hparams.scale(-1.0, product)

    at = LinearizedMap(
        residual=of_params.subtract(params, step.residual),
        vjp_params=lambda v: of_params.subtract(v, step.vjp_params(v)),
        vjp_hparams=vjp_hparams,
        jvp_hparams=None if cross_push is None else lambda u: of_params.scale(-1.0, cross_push(u)),
        dependence=step.dependence,
        jvp_params=None if push is None else lambda v: of_params.subtract(v, push(v)),
    )
    return of_hparams_only(at)


def of_hparams_only(at: LinearizedMap[P, H]) -> LinearizedMap[P, H]:
    """Return the map with the dependence on hparams only. A step need not depend on params.

    A residual may be linear in them.
    """
    if (known := at.dependence) is None:
        return at
    return at._replace(dependence=lambda: (used := known())._replace(params=[True] * len(used.params)))
