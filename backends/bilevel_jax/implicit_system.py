"""The linear system and the products of a minimizer's derivative."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import jax

from bilevel.convergence import OnFailure, report
from bilevel.linear_solvers.linear_solver import LinearSolver, run_solver
from bilevel.methods.implicit import Implicit
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import Args, H, P
from bilevel_jax.backend import JaxBackend, backend, jvp_in_hparams, vjp_in_hparams
from bilevel_jax.failure_callback import tell_failure
from bilevel_jax.partition import Rest, Static
from bilevel_jax.second_derivatives import explained

Run = Callable[..., Any]  # (function, *arguments): calls function(backend, *arguments), perhaps compiled


@dataclass(frozen=True)
class Moving(Static):
    """L as a function of w and of the other leaves that move, given by their places. The key of a cached jit."""

    loss: Callable[..., object]
    structure: Any
    places: tuple[int, ...]

    def __call__(self, params: object, moving: list[jax.Array], constants: Sequence[object]) -> object:
        leaves = list(constants)
        for i, leaf in zip(self.places, moving, strict=True):
            leaves.insert(i, leaf)
        hparams, call, captured, _ = jax.tree.unflatten(self.structure, leaves)
        return self.loss(params, hparams, call, captured)


@dataclass(frozen=True)
class Minimizer:
    """A loss with its further arguments and a solver.

    Attributes:
        loss: (w, λ, call, captured) -> L.
        rest: (λ, call, captured, options of the solver) without its arrays.
        make_solver: options -> solver.
        on_failure: as in `implicit_minimizer`.
        run: calls a function of the backend.
    """

    loss: Callable[..., object]
    rest: Rest
    make_solver: Callable[[list[object]], LinearSolver[object]]
    on_failure: OnFailure
    run: Run

    def at(self, params: P, arrays: Sequence[jax.Array], moves: Sequence[int]) -> "System[P]":
        """Return the linear system at a point. ``moves`` are the numbers of the arrays by which to differentiate."""
        places = [i for i, other in enumerate(self.rest.others) if other is None]
        moving = tuple(places[i] for i in moves)
        constants = [leaf for i, leaf in enumerate(self.rest.fill(arrays)) if i not in moving]
        loss = Moving(self.loss, self.rest.structure, moving)
        options = self.rest.join(arrays)[-1]
        return System(self, (loss, params, [arrays[i] for i in moves], (constants,)), options)


@dataclass(frozen=True)
class System(Generic[P]):
    """(∂²L/∂w²) v = rhs at a point, and products with ∂²L/∂λ∂w, where λ is a list of arrays."""

    minimizer: Minimizer
    point: tuple[Callable[..., object], P, list[jax.Array], Args]
    options: list[object]

    def solve(self, rhs: P) -> P:
        """Return v, and report a failure."""
        make_solver, on_failure = self.minimizer.make_solver, self.minimizer.on_failure
        solver = make_solver(self.options)
        v, info = self.minimizer.run(_solve, solver, *self.point, rhs)

        def tell(info: SolverInfo, options: list[object]) -> None:
            method = Implicit(make_solver(options))  # with numbers in place of tracers
            report(backend, info, method, on_failure, hint=" Run bl.diagnose for details.")

        if on_failure != "ignore":
            tell_failure(tell, lambda status: solver.failed(status), info, self.options)
        return v

    def hvp(self, v: P) -> P:
        """Return (∂²L/∂w²) v."""
        return self.minimizer.run(_hvp, *self.point, v)

    def minus_jvp(self, u: list[jax.Array]) -> P:
        """Return −(∂²L/∂λ∂w) u."""
        return self.minimizer.run(_minus_jvp, *self.point, u)

    def minus_vjp(self, v: P) -> list[jax.Array]:
        """Return −(∂²L/∂λ∂w)ᵀ v."""
        return self.minimizer.run(_minus_vjp, *self.point, v)


def _solve(
    backend: JaxBackend,
    solver: LinearSolver[object],
    inner: Callable[..., object],
    params: P,
    hparams: object,
    args: Args,
    rhs: P,
) -> tuple[P, SolverInfo]:
    A = LinearOperator(backend.space(params), backend.inner(inner, params, hparams, args).vjp_params)
    return run_solver(solver, A, rhs)


def _hvp(backend: JaxBackend, inner: Callable[..., object], params: P, hparams: object, args: Args, v: P) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    return jax.jvp(lambda w: slope(w, hparams), (params,), (v,))[1]


def _minus_jvp(backend: JaxBackend, inner: Callable[..., object], params: P, hparams: H, args: Args, u: H) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    return backend.space(params).scale(-1.0, jvp_in_hparams(slope, params, hparams, u))


def _minus_vjp(backend: JaxBackend, inner: Callable[..., object], params: P, hparams: H, args: Args, v: P) -> H:
    slope = backend.inner_slope(inner, params, hparams, args)
    with explained():
        return backend.space(hparams).scale(-1.0, vjp_in_hparams(slope, params, hparams, v))
