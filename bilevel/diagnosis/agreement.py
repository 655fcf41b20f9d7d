"""Whether the derivatives of a problem agree with differences of what they are derived from."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from bilevel.diagnosis.sweep import Agreement, Sweep
from bilevel.operators.combinators import norm
from bilevel.problems.gradients import inner_grad, inner_value_and_grad
from bilevel.protocols import Backend, BilevelProblem, Point, Scalar, Tree

DERIVATIVES = ("inner grad", "inner hvp", "inner cross_vjp", "outer grad_params", "outer grad_hparams")
STEPS = 5
SEED = 1
AWAY = 0.1  # from the point, relative to the weights


class Agreements(NamedTuple):
    """All that could be compared, in which arithmetic, and what stood in the way of more."""

    names: tuple[str, ...]  # of the derivatives that there are to compare
    of: tuple[Agreement, ...]
    eps: float  # of the dtype; nan where nothing could be compared
    obstacle: str  # what the objectives said to float64, or to other values than the ones given; "" if nothing


def kind_of(problem: BilevelProblem) -> str:
    """Return the curvature of a problem, or "equation" where w* solves one and minimizes nothing."""
    return getattr(problem, "curvature", "hessian") if hasattr(problem, "inner") else "equation"


def nothing(problem: BilevelProblem, obstacle: str) -> Agreements:
    """Return what is known where nothing could be compared."""
    # A residual derives from nothing, and Gauss-Newton products are no derivatives.
    left_out = {"equation": "inner grad", "gauss-newton": "inner hvp"}.get(kind_of(problem))
    return Agreements(tuple(name for name in DERIVATIVES if name != left_out), (), float("nan"), obstacle)


def compare(backend: Backend, problem: BilevelProblem, point: Point) -> Agreements:
    """Compare all first and second derivatives of a problem with differences, around a point.

    In float64 where the framework and the objectives can, else in their own dtype. Takes a linearization with one
    product of each kind, and some 9 gradients of L and 7 of F where all agrees at once, else at most 33 and 23.
    """
    if not _follows(backend, problem, point):
        return nothing(problem, "copies of params and hparams change the gradients")
    obstacle = ""
    for double in (True, False):
        try:
            with backend.aside(point, double) as at:
                look = _Look(backend, problem, point, at)
                names = nothing(problem, "").names
                return Agreements(names, tuple(look.agreements(names)), look.eps, obstacle)
        except Exception as error:  # whatever the objectives raise about arrays that are not the ones they know
            obstacle = obstacle or f"{type(error).__name__}: {error}"
    return nothing(problem, obstacle)


def _follows(backend: Backend, problem: BilevelProblem, point: Point) -> bool:
    """Tell whether the objectives compute with what they are handed: whether copies change their gradients."""
    with backend.aside(point, False) as at:
        copied = at(point.params, point.hparams)
        leaves = zip(backend.leaves(point.params), backend.leaves(copied.params), strict=True)
        if all(own is copy for (_, own), (_, copy) in leaves):
            return True
        try:
            found = backend.execute(_gradients, None, problem, copied)
        except ValueError:  # they do not depend on the copies at all
            return False
    with backend.aside(point, False):
        expected = backend.execute(_gradients, None, problem, point)
    space = backend.space
    change, size = (float(backend.to_host(norm(tree, space))) for tree in (space.axpy(-1.0, found, expected), expected))
    return change <= space.eps(point.params) ** 0.5 * size


class _Look:
    """A problem around a point: w + t d and λ + t e for random d and e."""

    def __init__(
        self, backend: Backend, problem: BilevelProblem, point: Point, at: Callable[[Tree, Tree], Point]
    ) -> None:
        self.backend, self.space, self.problem, self.at = backend, backend.space, problem, at
        self.start = at(point.params, point.hparams)
        self.eps = self.space.eps((self.start.params, self.start.hparams))
        self.tolerance = self.eps**0.25
        self.steps = [float(step) for step in self.eps ** np.linspace(0.25, 0.6, STEPS)]
        self.directions = _Directions(*backend.execute(_directions, None, problem, self.start))

    def agreements(self, names: Sequence[str]) -> Iterator[Agreement]:
        """Yield one for each of these derivatives."""
        product, transposed, cross = self._execute(_claims, 0.0, 0.0)
        if "inner grad" in names:
            # At a minimum the gradient says nothing: look a little away.
            slope = self._inner(AWAY, 0.0).along_d
            yield self._slope("inner grad", "inner", slope, lambda t: self._inner(AWAY + t, 0.0).value)
        if kind_of(self.problem) == "equation":
            yield self._slope("inner hvp", "inner grad", transposed, lambda t: self._inner(t, 0.0).along_u)
        elif "inner hvp" in names:
            d, dot = self.directions.d, self.space.dot
            grads = self._sweep(product, lambda t: self._inner(t, 0.0).grad)
            yield grads.result("inner hvp", "inner grad", dot(d, product), lambda grad: dot(d, grad))
        yield self._slope("inner cross_vjp", "inner grad", cross, lambda t: self._inner(0.0, t).along_d)
        _, in_w, in_lam = self._outer(0.0, 0.0)
        yield self._slope("outer grad_params", "outer", in_w, lambda t: self._outer(t, 0.0)[0])
        yield self._slope("outer grad_hparams", "outer", in_lam, lambda t: self._outer(0.0, t)[0])

    def _slope(self, name: str, source: str, claimed: Scalar, function: Callable[[float], Scalar]) -> Agreement:
        """Compare a number with the slope of a function at zero."""
        return self._sweep(claimed, function).result(name, source, claimed, lambda slope: slope)

    def _sweep(self, claimed: Tree, function: Callable[[float], Tree]) -> Sweep:
        """Compare a tree with central differences of a function at zero, until they agree."""
        sweep, space = Sweep(self.backend, claimed, self.tolerance), self.space
        for t in self.steps:
            if not sweep.agrees:
                sweep.add(space.scale(0.5 / t, space.axpy(-1.0, function(-t), function(t))))
        return sweep

    def _inner(self, in_w: float, in_lam: float) -> "_Inner":
        return _Inner(*self._execute(_inner, in_w, in_lam))

    def _outer(self, in_w: float, in_lam: float) -> tuple[Scalar, Scalar, Scalar]:
        """Return F, ∂F/∂w along d, and ∂F/∂λ along e."""
        return self._execute(_outer, in_w, in_lam)

    def _execute(self, function: Any, in_w: float, in_lam: float) -> Any:
        axpy, (d, e, _) = self.space.axpy, self.directions
        point = self.at(axpy(in_w, d, self.start.params), axpy(in_lam, e, self.start.hparams))
        return self.backend.execute(function, None, self.problem, point._replace(adjoint0=self.directions))


class _Directions(NamedTuple):
    """Random ones: d and u of w, e of λ."""

    d: Tree
    e: Tree
    u: Tree


class _Inner(NamedTuple):
    """L, ∂L/∂w, and ∂L/∂w along d and u; of an equation its residual, and no L."""

    value: Scalar | None
    grad: Tree
    along_d: Scalar
    along_u: Scalar


def _directions(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Tree, Tree, Tree]:
    """Return random d, e and u, as large as the weights: for each its own size and that of all."""
    space = backend.space

    def along(x: Tree, seed: int) -> Tree:
        typical = norm(x, space) / space.size(x) ** 0.5
        typical = space.xp.where(typical > 0, typical, 1.0)
        return space.map(lambda z, entry: z * (space.xp.abs(entry) + typical), space.normal_like(x, seed), x)

    return along(point.params, SEED), along(point.hparams, SEED + 1), along(point.params, SEED + 2)


def _gradients(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> list[Tree]:
    """Return ∂L/∂w, ∂F/∂w and ∂F/∂λ."""
    _, in_w, in_lam = backend.outer(problem.outer, point.params, point.hparams, point.outer_args)
    zeros = backend.space.zeros_like(point.hparams)
    grad = inner_grad(backend, problem, point.params, point.hparams, point.inner_args)
    return [grad, in_w, zeros if in_lam is None else in_lam]


def _claims(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Tree, Scalar, Scalar]:
    """Return H d, d·Hu, and d·(∂²L/∂λ∂w) e."""
    d, e, u = cast(_Directions, point.adjoint0)
    _, hvp, cross_vjp, *_ = problem.derivatives(backend, point.params, point.hparams, point.inner_args)
    return hvp(d), backend.space.dot(d, hvp(u)), _dot_or_zero(backend, cross_vjp(d), e)


def _inner(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> _Inner:
    d, _, u = cast(_Directions, point.adjoint0)
    value, grad = inner_value_and_grad(backend, problem, point.params, point.hparams, point.inner_args)
    return _Inner(value, grad, backend.space.dot(grad, d), backend.space.dot(grad, u))


def _outer(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Scalar, Scalar, Scalar]:
    d, e, _ = cast(_Directions, point.adjoint0)
    value, in_w, in_lam = backend.outer(problem.outer, point.params, point.hparams, point.outer_args)
    return value, backend.space.dot(in_w, d), _dot_or_zero(backend, in_lam, e)


def _dot_or_zero(backend: Backend, x: Tree | None, y: Tree) -> Scalar:
    return backend.space.dot(backend.space.zeros_like(y) if x is None else x, y)
