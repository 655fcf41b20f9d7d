"""The linear system and the products of the derivative of an implicit function w*(λ)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic

import jax

from bilevel.convergence import OnFailure, report, warn_if_at_kink
from bilevel.linear_solvers.linear_solver import LinearSolver, run_solver
from bilevel.methods.implicit import Implicit, solve_reduced
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.proximal import Proximal
from bilevel.results import SolverInfo
from bilevel.spaces.array import Args, H, P
from bilevel.trainings import Condition
from bilevel_jax.backend import JaxBackend, backend, jvp_in_hparams, transpose, vjp_in_hparams
from bilevel_jax.failure_callback import tell_failure
from bilevel_jax.partition import Rest, Static
from bilevel_jax.second_derivatives import explained

Run = Callable[..., Any]  # (function, *arguments): calls function(backend, *arguments), perhaps compiled


@dataclass(frozen=True)
class WithProx(Static):
    """(w, λ, ...) -> the inner loss, and the result of the proximal operator."""

    inner: Callable[..., object]
    prox: Callable[..., object]
    step_size: float

    def __call__(self, params: object, hparams: object, *args: object, **named: object) -> tuple[object, object]:
        return self.inner(params, hparams, *args, **named), self.prox(params, hparams, self.step_size)


def proximal_problem(condition: Condition, function: Callable[..., Any], args: Args) -> Proximal:
    """Return the problem of a `WithProx` of (w, λ, *args)."""

    def smooth(w: object, h: object, *args: object) -> object:
        return function(w, h, *args)[0]

    return Proximal(smooth, lambda v, h, _: function(v, h, *args)[1], smooth, condition.step_size)


def residual_of(
    backend: JaxBackend, condition: Condition, function: Callable[..., object], params: P, hparams: H, args: Args
) -> Callable[[P, H], P]:
    """Return (w, λ) -> r: the gradient of an inner loss, w − step(w, λ), or a residual.

    With a proximal operator, the step is the proximal step.
    """
    if condition.prox is not None:
        problem, space = proximal_problem(condition, function, args), backend.space(params)
        slope = backend.inner_slope(problem.smooth, params, hparams, args)
        prox = backend.checked_map(problem.prox, params, hparams, (problem.step_size,), "prox")
        return lambda w, h: space.subtract(w, prox(space.axpy(-problem.step_size, slope(w, h), w), h))
    if condition.role == "inner":
        return backend.inner_slope(function, params, hparams, args)
    value = backend.checked_map(function, params, hparams, args, condition.role)
    if condition.role == "residual":
        return value
    return lambda w, h: backend.space(w).subtract(w, value(w, h))


@dataclass(frozen=True)
class Moving(Static):
    """A condition as a function of w and of the other leaves that move, given by their places.

    It is the key of a cached jit.
    """

    condition: Condition
    function: Callable[..., object]
    structure: Any
    places: tuple[int, ...]

    def __call__(self, params: object, moving: list[jax.Array], constants: Sequence[object]) -> object:
        leaves = list(constants)
        for i, leaf in zip(self.places, moving, strict=True):
            leaves.insert(i, leaf)
        hparams, call, captured, _ = jax.tree.unflatten(self.structure, leaves)
        return self.function(params, hparams, call, captured)

    def residual(self, backend: JaxBackend, params: P, moving: H, args: Args) -> Callable[[P, H], P]:
        """Return (w, λ) -> r, where λ are the leaves that move."""
        return residual_of(backend, self.condition, self, params, moving, args)


@dataclass(frozen=True)
class ImplicitFunction:
    """λ -> w*: a condition with its further arguments, and a solver.

    Attributes:
        condition: the kind of the function.
        function: (w, λ, call, captured) -> an inner loss, a step or a residual.
        rest: (λ, call, captured, options of the solver) without its arrays.
        make_solver: options -> solver.
        on_failure: as in `implicit_minimizer`.
        run: calls a function of the backend.
    """

    condition: Condition
    function: Callable[..., object]
    rest: Rest
    make_solver: Callable[[list[object]], LinearSolver[object]]
    on_failure: OnFailure
    run: Run

    def at(self, params: P, arrays: Sequence[jax.Array], moves: Sequence[int]) -> "System[P]":
        """Return the linear system at a point. ``moves`` are the numbers of the arrays by which to differentiate."""
        places = [i for i, other in enumerate(self.rest.others) if other is None]
        moving = tuple(places[i] for i in moves)
        constants = [leaf for i, leaf in enumerate(self.rest.fill(arrays)) if i not in moving]
        function = Moving(self.condition, self.function, self.rest.structure, moving)
        options = self.rest.join(arrays)[-1]
        return System(self, (function, params, [arrays[i] for i in moves], (constants,)), options)


@dataclass(frozen=True)
class System(Generic[P]):
    """(∂r/∂w) v = rhs at a point, and products with ∂r/∂λ, where λ is a list of arrays."""

    implicit: ImplicitFunction
    point: tuple[Moving, P, list[jax.Array], Args]
    options: list[object]

    def solve(self, rhs: P, transposed: bool = False) -> P:
        """Return v, or with ``transposed`` the solution of (∂r/∂w)ᵀ v = rhs. Report a failure."""
        make_solver, on_failure = self.implicit.make_solver, self.implicit.on_failure
        symmetric, solver = self.implicit.condition.symmetric_system, make_solver(self.options)
        v, info = self.implicit.run(_solve, solver, transposed, *self.point, rhs)

        def tell(info: SolverInfo, options: list[object]) -> None:
            method = Implicit(make_solver(options))  # with numbers in place of tracers
            hint = " Run bl.diagnose for details."
            warn_if_at_kink(report(backend, info, method, on_failure, symmetric=symmetric, hint=hint))

        if on_failure == "ignore":
            return v
        return tell_failure(tell, lambda status: solver.failed(status), info, self.options, v)

    def jvp(self, v: P) -> P:
        """Return (∂r/∂w) v."""
        return self.implicit.run(_jvp, *self.point, v)

    def minus_jvp(self, u: list[jax.Array]) -> P:
        """Return −(∂r/∂λ) u."""
        return self.implicit.run(_minus_jvp, *self.point, u)

    def minus_vjp(self, v: P) -> list[jax.Array]:
        """Return −(∂r/∂λ)ᵀ v."""
        return self.implicit.run(_minus_vjp, *self.point, v)


def _solve(
    backend: JaxBackend,
    solver: LinearSolver[object],
    transposed: bool,
    function: Moving,
    params: P,
    hparams: list[jax.Array],
    args: Args,
    rhs: P,
) -> tuple[P, SolverInfo]:
    space = backend.space(params)
    if function.condition.symmetric:
        at = backend.inner(function, params, hparams, args)
        A = LinearOperator(space, at.vjp_params, indefinite=function.condition.indefinite)
        return run_solver(solver, A, rhs)
    if function.condition.prox is not None:
        at = proximal_problem(function.condition, function, args).linearize(backend, params, hparams, args)
        return solve_reduced(solver, LinearOperator(space, at.product), at, rhs, transposed)
    residual = function.residual(backend, params, hparams, args)
    # Linearized outside the solver's loop, because its body must not trace the function again.
    if transposed:
        pull = jax.vjp(lambda w: residual(w, hparams), params)[1]
        product: Callable[[P], P] = lambda v: pull(v)[0]  # noqa: E731
    else:
        product = jax.linearize(lambda w: residual(w, hparams), params)[1]
    A = LinearOperator(space, product, symmetric=False, transpose=transpose(product, params))
    return run_solver(solver, A, rhs)


def _jvp(backend: JaxBackend, function: Moving, params: P, hparams: list[jax.Array], args: Args, v: P) -> P:
    residual = function.residual(backend, params, hparams, args)
    return jax.jvp(lambda w: residual(w, hparams), (params,), (v,))[1]


def _minus_jvp(
    backend: JaxBackend, function: Moving, params: P, hparams: list[jax.Array], args: Args, u: list[jax.Array]
) -> P:
    residual = function.residual(backend, params, hparams, args)
    return backend.space(params).scale(-1.0, jvp_in_hparams(residual, params, hparams, u))


def _minus_vjp(
    backend: JaxBackend, function: Moving, params: P, hparams: list[jax.Array], args: Args, v: P
) -> list[jax.Array]:
    residual = function.residual(backend, params, hparams, args)
    with explained() if function.condition.symmetric_system else nullcontext():
        return backend.space(hparams).scale(-1.0, vjp_in_hparams(residual, params, hparams, v))
