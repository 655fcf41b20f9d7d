"""What the parts of the house expect of each other. The waist is `Linearization`; see docs/architecture.md."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from bilevel.results import Hypergradient, SolverInfo
from bilevel.spaces.space import Operator, Scalar, Tree, VectorSpace

if TYPE_CHECKING:
    from bilevel.problems.model_loss import ModelLoss


class Linearization(NamedTuple):
    """A bilevel problem at one point (w, λ): all that implicit differentiation needs.

    Attributes:
        value: F(w, λ), a scalar.
        grad_params: ∂F/∂w, the structure of params; the right-hand side of the linear system.
        grad_hparams: ∂F/∂λ, the structure of hparams; ``None`` where F does not depend on λ.
        hvp: v -> (∂²L/∂w²) v, from and to the structure of params. Where w solves an equation r(w, λ) = 0, and
            minimizes nothing, v -> (∂r/∂w)ᵀ v, wrapped in `NonSymmetric`.
        cross_vjp: v -> (∂²L/∂λ∂w)ᵀ v, or (∂r/∂λ)ᵀ v, from the structure of params to that of hparams; returns
            ``None`` where ∂L/∂w, or r, does not depend on λ.
    """

    value: Scalar
    grad_params: Tree
    grad_hparams: Tree | None
    hvp: Operator
    cross_vjp: Callable[[Tree], Tree | None]


class InnerDerivatives(NamedTuple):
    """What makes w* at one point, as an equation r(w, λ) = 0: r, and products with its Jacobians.

    For an inner objective, r is its gradient ∂L/∂w.
    """

    grad: Tree  # r
    hvp: Operator  # v -> (∂r/∂w)ᵀ v; `NonSymmetric` unless r is a gradient
    cross_vjp: Callable[[Tree], Tree | None]  # v -> (∂r/∂λ)ᵀ v; returns None where r does not depend on λ
    cross_jvp: Callable[[Tree], Tree] | None = None
    """u -> (∂r/∂λ) u, from the structure of hparams to that of params; None where a backend does not have it."""


class OuterDerivatives(NamedTuple):
    """The outer objective at one point; ``grad_hparams`` is ``None`` where it does not depend on λ."""

    value: Scalar
    grad_params: Tree
    grad_hparams: Tree | None


class Point(NamedTuple):
    """Where a problem is looked at."""

    params: Tree
    hparams: Tree
    inner_args: Any = ()  # a tuple; or a list of tuples, one batch per step
    outer_args: tuple[Any, ...] = ()
    adjoint0: Tree | None = None

    @property
    def batches(self) -> list[tuple[Any, ...]]:
        """The inner arguments, one tuple per batch."""
        return self.inner_args if isinstance(self.inner_args, list) else [self.inner_args]


@runtime_checkable
class BilevelProblem(Protocol):
    """An outer objective F, and what makes w* of λ: `bilevel.Problem`, `bilevel.FixedPoint`, `bilevel.Root`.

    Hashable, and equal to others of the same functions, so that JAX compiles once for all of them.
    """

    @property
    def outer(self) -> Callable[..., Scalar]: ...
    def derivatives(self, backend: Backend, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> InnerDerivatives:
        """Differentiate what makes w*, at a point; ``args`` are the ``inner_args``."""
        ...


class InnerProblem(Protocol):
    """An inner objective with analytic derivatives, for the numpy backend.

    ``vector`` has the structure of ``params``; so have the results of ``grad`` and ``hvp``, while that of
    ``cross_vjp`` has the structure of ``hparams``. Forward mode of ``unrolled`` asks for one method more,
    ``cross_jvp(params, hparams, vector, *args)``, whose vector is like ``hparams`` and its result like ``params``.
    With ``curvature="finite-differences"``, ``grad_hparams`` takes the place of all three: ∂L/∂λ, as ``grad`` is ∂L/∂w.
    """

    def __call__(self, params: Tree, hparams: Tree, *args: Any) -> Scalar: ...
    def grad(self, params: Tree, hparams: Tree, *args: Any) -> Tree: ...
    def hvp(self, params: Tree, hparams: Tree, vector: Tree, *args: Any) -> Tree: ...
    def cross_vjp(self, params: Tree, hparams: Tree, vector: Tree, *args: Any) -> Tree: ...


class OuterObjective(Protocol):
    """An outer objective with an analytic gradient, for the numpy backend.

    ``grad`` returns the pair (∂F/∂w, ∂F/∂λ); the second may be ``None`` for zero.
    """

    def __call__(self, params: Tree, hparams: Tree, *args: Any) -> Scalar: ...
    def grad(self, params: Tree, hparams: Tree, *args: Any) -> tuple[Tree, Tree | None]: ...


@dataclass(frozen=True)
class NonSymmetric:
    """A linear operator that need not be its own transpose: that of a fixed point or of a root.

    Solvers that rely on symmetry refuse it; see `IHVPSolver`.
    """

    product: Operator

    def __call__(self, v: Tree) -> Tree:
        return self.product(v)


@dataclass(frozen=True)
class Stochastic:
    """A symmetric operator that is known by a sequence of samples: Hessians on batches of data.

    A product is one with the first of them. Solvers that have no use for several refuse it; see `IHVPSolver`.
    """

    product: Operator
    sample: Callable[[Any], Operator]
    """i -> the operator of step i; i is counted in a loop."""

    def __call__(self, v: Tree) -> Tree:
        return self.product(v)


def same_kind(operator: Operator, change: Callable[[Operator], Operator]) -> Operator:
    """Return an operator of the same kind with its products changed."""
    if isinstance(operator, NonSymmetric):
        return NonSymmetric(change(operator.product))
    if isinstance(operator, Stochastic):
        return Stochastic(change(operator.product), lambda i: change(operator.sample(i)))
    return change(operator)


@runtime_checkable
class IHVPSolver(Protocol):
    """Solves A v = b: an inverse-Hessian-vector product.

    A is symmetric and stays the same, unless the solver has an attribute ``nonsymmetric = True`` or
    ``stochastic = True``: then it can be `NonSymmetric` or `Stochastic`, too. It may have a method
    ``prepare(operator, like, space)``, for `bl.prepare`. The rest of the library knows options by the names ``rtol``,
    ``damping`` and ``maxiter``, and tells of a solve that falls short what the attribute ``remedy`` says.
    """

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        """Return v and how it was found; ``x0`` is a warm start, which a direct method may ignore."""
        ...


@runtime_checkable
class HypergradientMethod(Protocol):
    """Turns a problem at a point into a hypergradient; what ``solver=`` means at its widest."""

    def hypergradient(self, backend: Backend, problem: BilevelProblem, point: Point) -> Hypergradient: ...


Solver = IHVPSolver | HypergradientMethod


class Backend(Protocol):
    """A framework: differentiates a problem, and knows its trees of arrays as vectors.

    Subclass it for the methods that have a body, or write all of them.
    """

    name: str
    """Also the name of the framework's top-level module, by which its arrays are recognised."""
    space: VectorSpace
    collective: ClassVar[bool] = False
    """Whether a product takes part of all processes, so that none is taken which not all of them are sure to take."""
    keeps_derivatives: ClassVar[bool] = False
    """Whether a scan can collect `InnerDerivatives`, and holding on to them costs less than computing them again."""

    @abstractmethod
    def owns(self, leaf: Any) -> bool:
        """Tell whether a leaf is an array of this framework."""
        ...

    @abstractmethod
    def leaves(self, tree: Tree) -> Sequence[tuple[str, Any]]:
        """Return the leaves with their paths, such as ``"['layer'][0]"``."""
        ...

    @abstractmethod
    def is_floating(self, leaf: Any) -> bool:
        """Tell whether an array holds real floating-point numbers."""
        ...

    @abstractmethod
    def device(self, leaf: Any) -> str | None:
        """Return where an array lives; ``None`` where the framework moves it to the others."""
        ...

    @abstractmethod
    def devices(self) -> list[str]:
        """Return the devices that this framework can use here, for people to read."""
        ...

    @abstractmethod
    def to_host(self, scalar: Scalar) -> Any:
        """Return a scalar as a Python number; ``None`` while it is only traced."""
        ...

    @abstractmethod
    def from_numpy(self, array: Any) -> Any:
        """Return a NumPy array as an array of this framework, of the same dtype where it has it."""
        ...

    @abstractmethod
    def to_numpy(self, array: Any) -> Any:
        """Return an array as a NumPy array on the host."""
        ...

    @abstractmethod
    def inner(self, objective: Any, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> InnerDerivatives:
        """Differentiate an inner objective at a point."""
        ...

    @abstractmethod
    def outer(
        self, objective: Any, params: Tree, hparams: Tree, args: tuple[Any, ...], role: str = "outer"
    ) -> OuterDerivatives:
        """Differentiate an outer objective at a point; ``role`` is what errors call it."""
        ...

    def gauss_newton(self, inner: ModelLoss, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> InnerDerivatives:
        """Differentiate an inner objective, with Gauss-Newton products for ``hvp``."""
        raise TypeError(
            f'curvature="gauss-newton": the {self.name} backend derives no Gauss-Newton products. Where an objective '
            'brings its own derivatives, let its hvp return them, with curvature="hessian".'
        )

    def jacobian(
        self, function: Callable[..., Tree], params: Tree, hparams: Tree, args: tuple[Any, ...], role: str
    ) -> InnerDerivatives:
        """Evaluate a map from params to trees like it; ``hvp`` and ``cross_vjp`` are its transposed Jacobians.

        ``role`` is what errors call the map.
        """
        raise TypeError(f"{role}: the {self.name} backend has no derivatives of fixed points and roots.")

    def linearize(
        self,
        problem: BilevelProblem,
        params: Tree,
        hparams: Tree,
        *,
        inner_args: tuple[Any, ...] = (),
        outer_args: tuple[Any, ...] = (),
    ) -> Linearization:
        """Return the problem at a point, ready for a solver."""
        outer = self.outer(problem.outer, params, hparams, outer_args)
        inner = problem.derivatives(self, params, hparams, inner_args)
        return Linearization(*outer, hvp=inner.hvp, cross_vjp=inner.cross_vjp)

    def execute(
        self, function: Callable[..., Any], solver: Solver | None, problem: BilevelProblem, point: Point
    ) -> Any:
        """Call function(backend, solver, problem, point), compiled where the framework compiles.

        The function is one of a module: a closure would be compiled again at each call.
        """
        return function(self, solver, problem, point)

    @contextmanager
    def aside(self, point: Point, double: bool) -> Iterator[Callable[[Tree, Tree], Point]]:
        """Let objectives be evaluated without a trace.

        In it, what they change besides (random states, the buffers of modules) changes as ever; on leaving, it is as it
        was. It yields ``at(params, hparams)``, which returns the point moved to other values. Objectives that compute
        with arrays of their own rather than with what they are handed follow as far as possible, and each time the
        random states and buffers are those of the start. With ``double``, the moved point is in float64, the arguments
        and what the objectives hold besides too, as far as possible.

        A backend that cannot do any of this inherits the moves alone.
        """
        del double
        yield lambda params, hparams: point._replace(params=params, hparams=hparams)
