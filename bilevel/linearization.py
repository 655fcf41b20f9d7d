"""A bilevel problem at one point, with the values and products for implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

from bilevel.spaces.array import Args, Array, H, Number, P, V
from bilevel.spaces.space import Space


class Linearization(NamedTuple, Generic[P, H]):
    """A bilevel problem at one point (w, λ), filled by the user, for `bl.hypergradient_from`.

    Attributes:
        value: F(w, λ), a scalar.
        grad_params: ∂F/∂w, with the structure of params: the right-hand side of the linear system.
        grad_hparams: ∂F/∂λ, with the structure of hparams; ``None`` if F does not depend on λ.
        hvp: v -> (∂²L/∂w²) v, from and to trees like params. For an equation r(w, λ) = 0 that is not a gradient,
            v -> (∂r/∂w)ᵀ v, wrapped in `NonSymmetric`.
        cross_vjp: v -> (∂²L/∂λ∂w)ᵀ v, or (∂r/∂λ)ᵀ v, from trees like params to trees like hparams. It returns ``None``
            if ∂L/∂w, or r, does not depend on λ.
    """

    value: Array | float
    grad_params: P
    grad_hparams: H | None
    hvp: Callable[[P], P]
    cross_vjp: Callable[[P], H | None]


@dataclass(frozen=True)
class NonSymmetric(Generic[V]):
    """Mark the ``hvp`` of a `Linearization` as the transposed Jacobian of an equation, which need not be symmetric.

    Args:
        product: v -> (∂r/∂w)ᵀ v.
        transpose: v -> (∂r/∂w) v, which only ``normal-cg`` needs.

    >>> import numpy as np, bilevel as bl
    >>> lin = bl.Linearization(
    ...     value=0.5, grad_params=np.array([1.0, 0.0]), grad_hparams=None,
    ...     hvp=bl.NonSymmetric(lambda v: np.array([[1.0, 0.0], [1.0, 1.0]]) @ v), cross_vjp=lambda v: v,
    ... )
    >>> bl.hypergradient_from(lin, solver="gmres").grad
    array([-1.,  1.])
    """

    product: Callable[[V], V]
    transpose: Callable[[V], V] | None = None

    def __call__(self, v: V) -> V:
        return self.product(v)


class Dependence(NamedTuple):
    """The arrays that a function depends on. It follows from the computation, so a derivative of zero counts.

    Attributes:
        params: whether it depends on each leaf of params, in the order of `Backend.leaves`.
        hparams: the same for hparams.
        others: shapes of trainable arrays that it depends on and that are no arguments, where the framework has them.
    """

    params: Sequence[bool]
    hparams: Sequence[bool]
    others: Sequence[tuple[int, ...]] = ()


class Reduction(NamedTuple, Generic[P]):
    """A symmetric system A y = b in place of (∂r/∂w)ᵀ v = c.

    Attributes:
        product: y -> A y.
        rhs: c -> b.
        adjoint: (y, c) -> v.
        kinks: returns a tree like params, with one for each entry where r has no derivative, to rounding, else zero.
        forward: c -> b and y -> t of the same system for (∂r/∂w) t = c, for decorators of trainings.
    """

    product: Callable[[P], P]
    rhs: Callable[[P], P]
    adjoint: Callable[[P, P], P]
    kinks: Callable[[], P]
    forward: Callable[[P], tuple[P, Callable[[P], P]]] | None = None


class JointProduct(NamedTuple, Generic[P, H]):
    """Two transposed products together.

    Attributes:
        products: ``vjp_params`` and ``vjp_hparams``.
        vjp: v -> both products with v.
    """

    products: tuple[Callable[[P], P], Callable[[P], H | None]]
    vjp: Callable[[P], tuple[P, H | None]]


class LinearizedMap(NamedTuple, Generic[P, H]):
    """A map r(w, λ) at one point, and products with its Jacobians. r = 0 defines w*.

    For an inner objective L, r is its gradient ∂L/∂w.

    Attributes:
        residual: r, with the structure of params.
        vjp_params: v -> (∂r/∂w)ᵀ v. For an inner objective, it is a Hessian-vector product.
        vjp_hparams: v -> (∂r/∂λ)ᵀ v. It returns None if r does not depend on λ.
        jvp_hparams: u -> (∂r/∂λ) u, from trees like hparams to trees like params. None if the backend does not have it.
        dependence: returns on which leaves of params the inner objective depends, and on which leaves of hparams r
            depends. It may take a product, unless ``vjp_hparams`` was called before. None if it is unknown.
        reduction: the symmetric system to solve for v. None: solve (∂r/∂w)ᵀ v = c itself.
        jvp_params: v -> (∂r/∂w) v, for a ∂r/∂w that is not symmetric. None if it is symmetric, or if the backend does
            not have it.
        joint: both transposed products together. None where this is not cheaper than one after the other.
    """

    residual: P
    vjp_params: Callable[[P], P]
    vjp_hparams: Callable[[P], H | None]
    jvp_hparams: Callable[[H], P] | None = None
    dependence: Callable[[], Dependence] | None = None
    reduction: Reduction[P] | None = None
    jvp_params: Callable[[P], P] | None = None
    joint: JointProduct[P, H] | None = None

    def vjp(self, v: P) -> tuple[P, H | None]:
        """Return ``vjp_params(v)`` and ``vjp_hparams(v)``."""
        products, joint = (self.vjp_params, self.vjp_hparams), self.joint
        if joint is None or joint.products != products:  # `_replace` may have replaced one
            return self.vjp_params(v), self.vjp_hparams(v)
        return joint.vjp(v)

    @property
    def product(self) -> Callable[[P], P]:
        """The product of the linear system: ``vjp_params``, or the product of the reduction."""
        return self.vjp_params if self.reduction is None else self.reduction.product

    def rhs(self, cotangent: P) -> P:
        """Return the right-hand side of the linear system for a cotangent c of w*."""
        return cotangent if self.reduction is None else self.reduction.rhs(cotangent)

    def adjoint(self, solution: P, cotangent: P) -> P:
        """Return v of (∂r/∂w)ᵀ v = c from the solution of the linear system."""
        return solution if self.reduction is None else self.reduction.adjoint(solution, cotangent)

    def count_kinks(self, space: Space[P]) -> Number:
        """Return the number of entries of params where r has no derivative; zero if there is no reduction."""
        return 0.0 if self.reduction is None else space.dot(kinks := self.reduction.kinks(), kinks)


class OuterDerivatives(NamedTuple, Generic[P, H]):
    """An objective and its gradients at one point.

    ``grad_hparams`` is ``None`` if the objective does not depend on λ. ``dependence`` is None if it is unknown.
    """

    value: Array
    grad_params: P
    grad_hparams: H | None
    dependence: Dependence | None = None


class Inputs(NamedTuple, Generic[P, H]):
    """The inputs of a bilevel problem: w, λ and the further arguments of its two objectives."""

    params: P
    hparams: H
    inner_args: Args = ()
    outer_args: Args = ()
