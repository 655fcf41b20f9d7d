"""Compare the derivatives of a problem with differences."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from bilevel.backend import Backend
from bilevel.diagnosis.best_precision import in_best_precision
from bilevel.diagnosis.following import changes
from bilevel.diagnosis.sweep import Agreement, Sweep
from bilevel.inspection.derivatives import DERIVATIVES, Derivatives, derivatives
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem, is_equation
from bilevel.spaces.array import Array, H, P, V

STEPS = 5
SEED = 1
R = TypeVar("R")
AWAY = 0.1  # distance from the point, relative to the weights


class Agreements(NamedTuple):
    """The comparisons, their dtype, and the obstacle to further comparisons."""

    names: tuple[str, ...]  # of the derivatives of the problem
    of: tuple[Agreement, ...]
    eps: float  # of the dtype; nan without a comparison
    obstacle: str  # the error of the objectives in float64, or at other values than the given ones; "" if none
    changed: tuple[str, ...] = ()  # the derivatives that other arrays than params and hparams determine


def nothing(problem: BilevelProblem, obstacle: str) -> Agreements:
    """Return the result without any comparison."""
    # A residual is not the derivative of an objective, and Gauss-Newton products are not derivatives.
    left_out = "inner grad" if is_equation(problem) else {"gauss-newton": "inner hvp"}.get(problem.kind)
    return Agreements(tuple(name for name in DERIVATIVES if name != left_out), (), float("nan"), obstacle)


def compare(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> Agreements:
    """Compare all first and second derivatives of a problem with differences, around a point.

    The differences are in float64 if the framework and the objectives support it, else in the dtype of the inputs. They
    take a linearization with one product of each kind. They also take some 9 gradients of L and 7 gradients of F if all
    derivatives agree immediately, else at most 33 and 23.
    """
    empty = nothing(problem, "copies of params and hparams change derivatives")
    changed = changes(backend, problem, inputs)
    names = [name for name in empty.names if name not in changed]
    if "inner grad" in changed or not names:  # the others depend on it
        return empty._replace(changed=changed)

    def look(at: Callable[[P, H], Inputs[P, H]]) -> tuple[tuple[Agreement, ...], float]:
        found = _Look(backend, problem, inputs, at)
        return tuple(found.agreements(names)), found.eps

    found, obstacle = in_best_precision(backend, inputs, look)
    of, eps = found or ((), float("nan"))
    return Agreements(empty.names, of, eps, obstacle, changed)


def elsewhere(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], at: Callable[[P, H], Inputs[P, H]]
) -> Derivatives[P, H]:
    """Return the derivatives at another point."""
    return _Look(backend, problem, inputs, at).derivatives()


class _Look(Generic[P, H]):
    """A problem around a point: w + t d and λ + t e for random d and e."""

    def __init__(
        self, backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], at: Callable[[P, H], Inputs[P, H]]
    ) -> None:
        self.backend, self.problem, self.at = backend, problem, at
        params, hparams, *_ = at(inputs.params, inputs.hparams)
        self.of_params, self.of_hparams = backend.space(params), backend.space(hparams)
        # Copies, because the next call of ``at`` may overwrite its last result.
        self.params, self.hparams = self.of_params.copy(params), self.of_hparams.copy(hparams)
        self.eps = max(self.of_params.eps, self.of_hparams.eps)
        self.tolerance = self.eps**0.25
        self.steps = [float(step) for step in self.eps ** np.linspace(0.25, 0.6, STEPS)]
        self.directions = _Directions(*backend.run(_directions, self.params, self.hparams))

    def agreements(self, names: Sequence[str]) -> Iterator[Agreement]:
        """Yield the agreement of each of these derivatives."""
        product, transposed, cross = self._run(_claims, 0.0, 0.0)
        if "inner grad" in names:
            # At a minimum the gradient vanishes: compare at a distance.
            slope = self._run(_inner, AWAY, 0.0).along_d
            yield self._slope("inner grad", "inner", slope, lambda t: self._run(_inner, AWAY + t, 0.0).value)
        if is_equation(self.problem) and "inner hvp" in names:
            yield self._slope("inner hvp", "inner grad", transposed, lambda t: self._run(_inner, t, 0.0).along_u)
        elif "inner hvp" in names:
            d, dot = self.directions.d, self.of_params.dot
            grads = self._sweep(product, lambda t: self._run(_inner, t, 0.0).grad)
            yield grads.result("inner hvp", "inner grad", dot(d, product), lambda grad: dot(d, grad))
        if "inner cross_vjp" in names:
            yield self._slope("inner cross_vjp", "inner grad", cross, lambda t: self._run(_inner, 0.0, t).along_d)
        _, in_w, in_lam = self._run(_outer, 0.0, 0.0)
        if "outer grad_params" in names:
            yield self._slope("outer grad_params", "outer", in_w, lambda t: self._run(_outer, t, 0.0)[0])
        if "outer grad_hparams" in names:
            yield self._slope("outer grad_hparams", "outer", in_lam, lambda t: self._run(_outer, 0.0, t)[0])

    def derivatives(self) -> Derivatives[P, H]:
        """Return the derivatives away from the point."""
        return self._run(_derivatives, AWAY, AWAY)

    def _slope(self, name: str, source: str, claimed: Array, function: Callable[[float], Any]) -> Agreement:
        """Compare a number with the slope of a function at zero."""
        return self._sweep(claimed, function).result(name, source, claimed, lambda slope: slope)

    def _sweep(self, claimed: V, function: Callable[[float], V]) -> Sweep[V]:
        """Compare a tree with central differences of a function at zero, until they agree."""
        sweep = Sweep(self.backend, claimed, self.tolerance)
        for t in self.steps:
            if not sweep.agrees:
                sweep.add(function(t), function(-t), t)
        return sweep

    def _run(self, function: Callable[..., R], in_w: float, in_lam: float) -> R:
        """Call function(backend, problem, inputs, directions), with the inputs moved along d and e."""
        d, e, _ = self.directions
        params = self.of_params.axpy(in_w, d, self.params)
        moved = self.at(params, self.of_hparams.axpy(in_lam, e, self.hparams))
        return self.backend.run(function, self.problem, moved, self.directions)


class _Directions(NamedTuple, Generic[P, H]):
    """Random directions: d and u of w, e of λ."""

    d: P
    e: H
    u: P


class _Inner(NamedTuple, Generic[P]):
    """L, ∂L/∂w, and ∂L/∂w along d and u. For an equation, None and the residual."""

    value: Array | None
    grad: P
    along_d: Array
    along_u: Array


def _directions(backend: Backend, params: P, hparams: H) -> tuple[P, H, P]:
    """Return random d, e and u. The scale of an entry is its absolute value plus the typical absolute value.

    Hyperparameters that are zero up to rounding, such as a log penalty 0.1 + 0.2 - 0.3, have a typical value of one:
    steps in proportion to their values would be lost in rounding.
    """

    def along(x: V, seed: int, tiny: float) -> V:
        space = backend.space(x)
        typical = space.norm(x) / space.size**0.5
        typical = space.xp.where(typical > tiny, typical, 1.0)
        return space.map(lambda z, entry: z * (space.leaf_xp.abs(entry) + typical), space.normal(seed), x)

    tiny = backend.space(hparams).eps ** 0.5
    return along(params, SEED, 0.0), along(hparams, SEED + 1, tiny), along(params, SEED + 2, 0.0)


def _claims(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], directions: _Directions[P, H]
) -> tuple[P, Array, Array]:
    """Return H d, d·Hu, and d·(∂²L/∂λ∂w) e."""
    d, e, u = directions
    at = problem.linearize(backend, inputs.params, inputs.hparams, inputs.inner_args)
    transposed = _dot(backend, d, at.vjp_params(u))
    return at.vjp_params(d), transposed, _dot(backend, at.vjp_hparams(d), e)


def _derivatives(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], directions: _Directions[P, H]
) -> Derivatives[P, H]:
    return derivatives(backend, problem, inputs, directions.u)


def _inner(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], directions: _Directions[P, H]) -> _Inner[P]:
    params, hparams, inner_args, _ = inputs
    value, grad = problem.value_and_residual(backend, params, hparams, inner_args)
    return _Inner(value, grad, _dot(backend, grad, directions.d), _dot(backend, grad, directions.u))


def _outer(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], directions: _Directions[P, H]
) -> tuple[Array, Array, Array]:
    """Return F, ∂F/∂w along d, and ∂F/∂λ along e."""
    value, in_w, in_lam, _ = backend.outer(problem.outer, inputs.params, inputs.hparams, inputs.outer_args)
    return value, _dot(backend, in_w, directions.d), _dot(backend, in_lam, directions.e)


def _dot(backend: Backend, x: V | None, y: V) -> Array:
    space = backend.space(y)
    return space.leaf(space.dot(space.zeros() if x is None else x, y))
