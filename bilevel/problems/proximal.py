"""Problems whose params minimize a smooth function plus a function with kinks, or a smooth function on a convex set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from bilevel.linearization import Dependence, LinearizedMap, Reduction
from bilevel.options import check_real
from bilevel.problems.gradients import in_params
from bilevel.problems.kinks import kink_width
from bilevel.problems.problem import check_functions
from bilevel.problems.protocols import Kind
from bilevel.prox.operator import Projection, ProximalOperator
from bilevel.prox.separable import Separable
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.space import Space

if TYPE_CHECKING:
    from bilevel.backend import Backend

SEED = 5
JUMP = 0.01  # a larger change of an entry of P u is no smooth change, where u is a random vector


class _ProximalStep:
    """A problem whose w* is the fixed point of w ← T(w − s ∇smooth(w, λ), λ), for a proximal operator T."""

    smooth: Callable[..., object]
    step_size: float

    @property
    @abstractmethod
    def _operator(self) -> tuple[str, Callable[..., Any], Args]:
        """The name of T, T, and its arguments after λ."""
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        """The kind of (∂r/∂w)ᵀ: it has a symmetric form."""
        return "proximal"

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate w − T(w − s ∇smooth) at a point."""
        return self.linearize_step(backend, params, hparams, args, backend.inner(self.smooth, params, hparams, args))

    def linearize_step(
        self, backend: Backend, params: P, hparams: H, args: Args, smooth: LinearizedMap[P, H]
    ) -> LinearizedMap[P, H]:
        """Differentiate w − T(w − s ∇smooth), where ∇smooth is linearized already."""
        space = backend.space(params)
        x = space.axpy(-self.step_size, smooth.residual, params)

        def linearized_at(x: P) -> LinearizedMap[P, H]:
            label, function, rest = self._operator
            return backend.jacobian(function, x, hparams, rest, label=label)

        curved = self._on_support(params, x, hparams, args) or smooth.vjp_params
        at = _At(space, backend.space(hparams), self.step_size, smooth, linearized_at(x), curved)
        residual = space.subtract(params, at.operator.residual)
        return LinearizedMap(
            residual=residual,
            vjp_params=at.vjp_params,
            vjp_hparams=at.vjp_hparams,
            jvp_hparams=at.jvp_hparams if smooth.jvp_hparams and at.operator.jvp_hparams else None,
            dependence=at.dependence if smooth.dependence and at.operator.dependence else None,
            reduction=Reduction(
                at.product,
                at.operator.vjp_params,
                at.adjoint,
                lambda: _kinks(space, linearized_at, params, x, residual),
                at.forward,
            ),
        )

    def _on_support(self, params: P, x: P, hparams: object, args: Args) -> Callable[[P], P] | None:
        """Return u -> P H u for vectors u = P y, if P is a mask and objects for NumPy have this product. Else None.

        The product skips the entries that the mask sets to zero.
        """
        operator: Any = self._operator[1]
        if not (isinstance(params, np.ndarray) and hasattr(self.smooth, "hvp_on") and hasattr(operator, "support")):
            return None
        smooth: Any = self.smooth
        return smooth.hvp_on(operator.support(x, hparams, self.step_size), params, hparams, *args)

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[None, P]:
        """Return None, since the objective is not known, and w − T(w − s ∇smooth)."""
        space = backend.space(params)
        _, grad, *_ = in_params(backend, self.smooth, params, hparams, args)
        return None, space.subtract(params, self.step(params, grad, hparams, space))

    def step(self, params: P, grad: P, hparams: object, space: Space[P], step_size: Any = None) -> P:
        """Return T(w − s grad), by default with the step size of the problem."""
        _, function, rest = self._operator
        s = self.step_size if step_size is None else step_size
        rest = (s,) if rest else rest  # a projection takes no step size
        return function(space.axpy(-s, grad, params), hparams, *rest)


@dataclass(frozen=True)
class Proximal(_ProximalStep):
    """Minimize ``outer(w*, λ)`` over λ, where ``w*`` minimizes smooth(w, λ) + g(w, λ) over w. g is convex with kinks.

    g is given by its proximal operator (Parikh & Boyd, 2014): an L1 norm, a group norm, a nuclear norm, a constraint.
    `bl.prox` has common ones. w* is a fixed point of the proximal step,

        w* = prox(x, λ, s)   with   x = w* − s ∇smooth(w*, λ),

    for any step size s > 0. The hypergradient needs P = ∂prox/∂v at x, which is symmetric with eigenvalues from 0 to 1,
    since prox is the gradient of a convex function (Moreau, 1965). With H = ∂²smooth/∂w² and c = ∂F/∂w, a solver
    computes y of the symmetric, positive semidefinite system

        (P H P + (P − P²)/s) y = P c.

    For an L1 norm or bounds, P is a mask, and this is the system on the support (Bertrand et al., JMLR 2022). Then

        u = P y,    v = y/s + (I − P) (c − H u + (u − y)/s),
        dF/dλ = ∂F/∂λ + (∂prox/∂λ)ᵀ v − s (∂²smooth/∂λ∂w)ᵀ P v.

    So all solvers apply, and a product takes one Hessian-vector product and two products with P. "unrolled" runs
    the proximal step, whose step size must be at most 1/(largest eigenvalue of H). ``hg.adjoint`` is y.

    Args:
        smooth: (params, hparams, *inner_args) -> scalar, as ``inner`` of `bl.Problem`.
        prox: (v, hparams, step_size) -> argmin over u of ½ ‖u − v‖² + step_size · g(u, λ), where v and u are like
            params. It must have a derivative at x. For the numpy backend, an object that also has the methods
            ``vjp_params(v, hparams, vector, step_size)`` and ``vjp_hparams(...)``: products of the transposed Jacobians
            with a vector. ``vjp_hparams`` may return None for zero.
        outer: F, as in `bl.Problem`.
        step_size: s > 0. Solution and derivative do not depend on it.

    Raises:
        TypeError: if one of the functions cannot be called, or ``step_size`` is no number.
        ValueError: unless ``step_size`` is positive and finite.

    >>> import numpy as np, bilevel as bl
    >>> quadratic = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.zeros(2))
    >>> problem = Proximal(quadratic.inner, bl.prox.l1(0.5), quadratic.outer)  # w* = λ with soft threshold 0.5
    >>> bl.hypergradient(problem, np.array([1.5, 0.0]), np.array([2.0, 0.1])).grad  # of F = ‖w*‖²/2
    array([1.5, 0. ])
    """

    smooth: Callable[..., object]
    prox: Callable[..., object]
    outer: Callable[..., object]
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_functions(self, smooth="a scalar", outer="a scalar")
        _check_operator(self, "prox", "(v, hparams, step_size)")
        check_real(self, "step_size", above=0)

    @property
    def _operator(self) -> tuple[str, Callable[..., Any], Args]:
        return "prox", self.prox, (self.step_size,)


@dataclass(frozen=True)
class Projected(_ProximalStep):
    """Minimize ``outer(w*, λ)`` over λ, where ``w*`` minimizes smooth(w, λ) over w in a convex set C(λ).

    It is `Proximal` with the projection on C(λ) as the proximal operator. `bl.projections` has common sets.

    Args:
        smooth: (params, hparams, *inner_args) -> scalar, as ``inner`` of `bl.Problem`.
        project: (v, hparams) -> the point of C(λ) that is nearest to v. For the numpy backend, an object that also has
            the methods ``vjp_params(v, hparams, vector)`` and ``vjp_hparams(...)``, as in `Proximal`.
        outer: F, as in `bl.Problem`.
        step_size: s > 0. Solution and derivative do not depend on it.

    Raises:
        TypeError, ValueError: as in `Proximal`.
    """

    smooth: Callable[..., object]
    project: Callable[..., object]
    outer: Callable[..., object]
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_functions(self, smooth="a scalar", outer="a scalar")
        _check_operator(self, "project", "(v, hparams)")
        parts = [part for _, part in self.project.operators] if isinstance(self.project, Separable) else [self.project]
        for part in parts:
            if isinstance(part, ProximalOperator) and not isinstance(part, Projection):
                raise TypeError(
                    f"Projected.project: {type(part).__name__} is a proximal operator and no projection, so it needs "
                    "the step size. Use bl.Proximal."
                )
        check_real(self, "step_size", above=0)

    @property
    def _operator(self) -> tuple[str, Callable[..., Any], Args]:
        return "project", self.project, ()


@dataclass(frozen=True)
class _At(Generic[P, H]):
    """The derivatives of r = w − T(w − s ∇smooth) at a point.

    Attributes:
        smooth: ∇smooth, linearized at w. Its product is H.
        operator: T, linearized at w − s ∇smooth. Its product is P.
        s: the step size.
        curved: u -> H u for vectors u = P y. It may be wrong by a vector that P maps to zero.
    """

    space: Space[P]
    of_hparams: Space[H]
    s: float
    smooth: LinearizedMap[P, H]
    operator: LinearizedMap[P, H]
    curved: Callable[[P], P]

    def vjp_params(self, v: P) -> P:
        """Return (∂r/∂w)ᵀ v = v − (I − s H) P v."""
        u = self.operator.vjp_params(v)
        return self.space.axpy(self.s, self.smooth.vjp_params(u), self.space.subtract(v, u))

    def vjp_hparams(self, v: P) -> H | None:
        """Return (∂r/∂λ)ᵀ v = s (∂²smooth/∂λ∂w)ᵀ P v − (∂T/∂λ)ᵀ v."""
        by_operator = self.operator.vjp_hparams(v)
        by_smooth = self.smooth.vjp_hparams(self.operator.vjp_params(v))
        if by_operator is None:
            return None if by_smooth is None else self.of_hparams.scale(self.s, by_smooth)
        minus = self.of_hparams.scale(-1.0, by_operator)
        return minus if by_smooth is None else self.of_hparams.axpy(self.s, by_smooth, minus)

    def jvp_hparams(self, u: H) -> P:
        """Return (∂r/∂λ) u = s P (∂²smooth/∂λ∂w) u − (∂T/∂λ) u."""
        push_smooth, push_operator = self.smooth.jvp_hparams, self.operator.jvp_hparams
        assert push_smooth is not None
        assert push_operator is not None
        by_smooth = self.operator.vjp_params(push_smooth(u))  # P is its own transpose
        return self.space.axpy(self.s, by_smooth, self.space.scale(-1.0, push_operator(u)))

    def product(self, y: P) -> P:
        """Return P H P y + (P − P²) y / s = P (H u + (y − u)/s) with u = P y."""
        u = self.operator.vjp_params(y)
        curved = self.space.axpy(1 / self.s, self.space.subtract(y, u), self.curved(u))
        return self.operator.vjp_params(curved)

    def adjoint(self, y: P, c: P) -> P:
        """Return v = y/s + (I − P) d with d = c − H u + (u − y)/s, where u = P y.

        P d is the residual of the system. So v = y/s + d at a solution y, and I − P removes the residual elsewhere.
        """
        space, u = self.space, self.operator.vjp_params(y)
        d = space.subtract(c, self.smooth.vjp_params(u))
        d = space.axpy(1 / self.s, space.subtract(u, y), d)
        return space.axpy(1 / self.s, y, space.subtract(d, self.operator.vjp_params(d)))

    def forward(self, c: P) -> tuple[P, Callable[[P], P]]:
        """Return b and y -> t with (∂r/∂w) t = c: b = P ((2 c − P c)/s − H d) and t = d + P y, where d = (I − P) c."""
        space, by_operator = self.space, self.operator.vjp_params  # P is its own transpose
        d = space.subtract(c, by_operator(c))
        b = space.axpy(1 / self.s, space.axpy(1.0, c, d), space.scale(-1.0, self.smooth.vjp_params(d)))
        return by_operator(b), lambda y: space.axpy(1.0, by_operator(y), d)

    def dependence(self) -> Dependence:
        """Return the dependence of r: on all leaves of params, and on the leaves of hparams in ∇smooth or T."""
        of_smooth, of_operator = self.smooth.dependence, self.operator.dependence
        assert of_smooth is not None
        assert of_operator is not None
        in_smooth, in_operator = of_smooth(), of_operator()
        flags = [a or b for a, b in zip(in_smooth.hparams, in_operator.hparams, strict=True)]
        return Dependence([True] * len(in_smooth.params), flags, in_smooth.others)


def _kinks(space: Space[P], linearized_at: Callable[[P], LinearizedMap[P, Any]], params: P, x: P, residual: P) -> P:
    """Return a tree with one for each entry that is at a kink of T, and zero elsewhere.

    At a kink, P differs between two points on opposite sides of x. Their distance from x is the error of x: rounding,
    and the distance of params from the solution, which the residual measures.
    """
    xp = space.xp
    distance = kink_width(space, residual, xp.maximum(space.max_abs(params), space.max_abs(x)))
    signs = space.map(space.leaf_xp.sign, space.normal(SEED))
    u = space.normal(SEED + 1)  # a product with u stands for the matrix P
    high, low = (linearized_at(space.axpy(sign * distance, signs, x)).vjp_params(u) for sign in (1.0, -1.0))
    change = space.subtract(high, low)
    return space.map(lambda jump: 1.0 * (space.leaf_xp.abs(jump) > JUMP), change)


def _check_operator(problem: object, role: str, arguments: str) -> None:
    operator = getattr(problem, role)
    if not callable(operator):
        raise TypeError(
            f"{type(problem).__name__}.{role}: expected a function of {arguments} that returns a tree like params, got "
            f"{type(operator).__name__}."
        )
    for other in ("smooth", "outer"):
        if isinstance(found := getattr(problem, other), ProximalOperator | Separable):
            raise TypeError(
                f"{type(problem).__name__}.{other}: got the operator {type(found).__name__}. Pass the arguments in the "
                f"order (smooth, {role}, outer), or by name."
            )
