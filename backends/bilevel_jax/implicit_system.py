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
    """(w, λ, ...) -> (the inner loss at w, the proximal operator at w).

    So both are one function, whose captured values and arguments are found at once.
    """

    inner: Callable[..., object]
    prox: Callable[..., object]
    step_size: float

    def __call__(self, params: object, hparams: object, *args: object, **named: object) -> tuple[object, object]:
        return self.inner(params, hparams, *args, **named), self.prox(params, hparams, self.step_size)


def proximal_problem(condition: Condition, function: Callable[..., Any], args: Args) -> Proximal:
    """Return the problem with the loss and the proximal operator of a `WithProx` of (w, λ, *args).

    The outer objective is a placeholder.
    """

    def smooth(w: object, h: object, *args: object) -> object:
        return function(w, h, *args)[0]

    return Proximal(smooth, lambda v, h, _: function(v, h, *args)[1], smooth, condition.step_size)


def residual_of(
    backend: JaxBackend, condition: Condition, function: Callable[..., object], params: P, hparams: H, args: Args
) -> Callable[[P, H], P]:
    """Return (w, λ) -> r: the gradient of an inner loss, w − step(w, λ), or a residual.

    For an inner loss with a proximal operator, r is w − (the proximal step of w).
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
    """A condition as a function of w, of the leaves by which JAX differentiates, and of the other leaves.

    The leaves of the first kind move, the others are constant. The object is compared by its value, because it belongs
    to the key of a cached jit.

    Attributes:
        condition, function: as in `ImplicitFunction`.
        structure: the structure of (λ, call, captured, options of the solver).
        places: the places of the leaves that move, among all leaves of this tree, in ascending order.
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
        """Return (w, λ) -> r, where λ is the list of the leaves that move. ``args`` holds the constant leaves."""
        return residual_of(backend, self.condition, self, params, moving, args)


@dataclass(frozen=True)
class ImplicitFunction:
    """λ -> w*: a condition with its further arguments, and a solver.

    Attributes:
        condition: the kind of the function.
        function: (w, λ, call, captured) -> an inner loss, a step or a residual. ``call`` has the further arguments.
            ``captured`` has the traced values that the user's function closes over.
        rest: (λ, call, captured, options of the solver) without its arrays.
        make_solver: options -> the solver. The list of options is empty unless one of them is traced.
        on_failure: as in `implicit_minimizer`.
        run: calls a function with the backend and arguments, compiled if possible.
    """

    condition: Condition
    function: Callable[..., object]
    rest: Rest
    make_solver: Callable[[list[object]], LinearSolver[object]]
    on_failure: OnFailure
    run: Run

    def at(self, params: P, arrays: Sequence[jax.Array], moves: Sequence[int]) -> "System[P]":
        """Return the linear system at w = ``params``.

        ``arrays`` are the arrays of ``rest``. ``moves`` are the numbers of those by which JAX differentiates, in
        ascending order.
        """
        of_arrays = [i for i, other in enumerate(self.rest.others) if other is None]
        places = tuple(of_arrays[i] for i in moves)
        constants = [leaf for i, leaf in enumerate(self.rest.fill(arrays)) if i not in places]
        function = Moving(self.condition, self.function, self.rest.structure, places)
        options = self.rest.join(arrays)[-1]
        return System(self, (function, params, [arrays[i] for i in moves], (constants,)), options)


@dataclass(frozen=True)
class System(Generic[P]):
    """(∂r/∂w) v = rhs at a point, and products with ∂r/∂λ, where λ is the list of the arrays that move.

    Attributes:
        implicit: the implicit function.
        point: the condition and its arguments: w, the arrays that move, and a tuple with the list of constant leaves.
        options: the argument of ``make_solver``.
    """

    implicit: ImplicitFunction
    point: tuple[Moving, P, list[jax.Array], Args]
    options: list[object]

    def solve(self, rhs: P, transposed: bool = False) -> P:
        """Return v, or with ``transposed`` the solution of (∂r/∂w)ᵀ v = rhs. Report a failed solve."""
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
    # Linearize here and not in the products, because the body of the solver's loop must not trace the function again.
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
