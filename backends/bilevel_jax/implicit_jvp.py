"""The derivative of a minimizer, as a rule for JAX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0

from bilevel.convergence import OnFailure, report
from bilevel.linear_solvers.linear_solver import LinearSolver, check_requirements
from bilevel.methods.implicit import Implicit
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import P
from bilevel.validation import check_scalar, leaf_names
from bilevel_jax.backend import JaxBackend, backend, cross_products
from bilevel_jax.dependence import depends
from bilevel_jax.partition import Static, combine, partition
from bilevel_jax.sharding import unvarying


def with_implicit_jvp(
    inner: Callable[..., Any],
    solver: LinearSolver[Any],
    on_failure: OnFailure,
    params: P,
    hparams: object,
    args: tuple[object, ...],
) -> P:
    """Return params, which JAX then differentiates as the minimizer of inner(params, hparams, *args).

    One rule, along a change of any of the arrays, gives all modes: JAX transposes it for reverse mode, where the linear
    solve is that for the adjoint, and differentiates it for higher orders.
    """
    loss, captured = _uncover(inner, params, hparams, args)
    make_solver, options = _uncover_options(solver)
    leaves, structure = jax.tree.flatten((hparams, args, captured, options))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    others = [None if array else leaf for array, leaf in zip(is_array, leaves, strict=True)]

    # A loss that captures something is made for this call: there is nothing to cache.
    call = partial(_call, backend) if captured else backend.compiled
    call(_check, loss, params, hparams, (args, captured))

    @jax.custom_jvp
    def attach(params: Any, arrays: list[Any]) -> Any:
        return params

    @partial(attach.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        params = attach(*primals)  # with its derivative, for those of this rule
        arrays, changes = iter(primals[1]), iter(tangents[1])
        leaves = [next(arrays) if array else leaf for array, leaf in zip(is_array, others, strict=True)]
        moves = {i: next(changes) for i, array in enumerate(is_array) if array}
        moves = {i: u for i, u in moves.items() if not isinstance(u, SymbolicZero) and u.dtype != float0}
        if not moves:
            return params, jax.tree.map(jnp.zeros_like, params)

        moving = _Moving(loss, structure, tuple(moves))
        constants = [leaf for i, leaf in enumerate(leaves) if i not in moves]
        here = (moving, params, [leaves[i] for i in moves], (constants,))
        solver = make_solver(jax.tree.unflatten(structure, leaves)[-1])

        def tell(info: SolverInfo) -> None:
            report(backend, info, Implicit(solver), on_failure, hint=" bl.diagnose looks closer.")

        def solve(_: Any, rhs: Any) -> Any:
            x, info = call(_solve, solver, *here, rhs)
            if on_failure != "ignore":
                jax.debug.callback(tell, info)
            return x

        # JAX cannot transpose a solve in which only some leaves move, for example weights with a penalty and a bias
        # without one. So all leaves are tied together wherever they may be a right-hand side.
        rhs = _tied(call(_minus_jvp_hparams, *here, list(moves.values())))
        change = lax.custom_linear_solve(lambda v: _tied(call(_hvp, *here, v)), rhs, solve, symmetric=True)
        return params, unvarying(_tied(change), params)

    return attach(params, [leaf for array, leaf in zip(is_array, leaves, strict=True) if array])


def _tied(tree: Any) -> Any:
    """Return a tree with each leaf a linear function of all leaves, by adding a sum of them that is chosen to be zero.

    The barrier keeps the leaves together. It is not enough: from JAX 0.11.2 on, the transpose of a barrier fails if one
    operand is a constant. The selection lets no nan through, and XLA removes it.
    """
    sums = [jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]
    zero = sum(lax.select(jnp.zeros_like(total, bool), total, jnp.zeros_like(total)) for total in sums)
    return lax.optimization_barrier(jax.tree.map(lambda leaf: leaf + jnp.asarray(zero, leaf.dtype), tree))


@dataclass(frozen=True)
class _Plain(Static):
    """(w, λ, args, captured) -> L, which captures nothing."""

    inner: Callable[..., Any]

    def __call__(self, params: Any, hparams: Any, args: tuple[Any, ...], captured: list[Any]) -> Any:
        return self.inner(params, hparams, *args)


@dataclass(frozen=True)
class _Moving(Static):
    """L as a function of w and those leaves of all else that move, by their places; what a jit is cached by."""

    loss: Callable[..., Any]
    structure: Any
    places: tuple[int, ...]

    def __call__(self, params: Any, moving: list[Any], constants: Sequence[Any]) -> Any:
        leaves = list(constants)
        for i, leaf in zip(self.places, moving, strict=True):
            leaves.insert(i, leaf)
        hparams, args, captured, _ = jax.tree.unflatten(self.structure, leaves)
        return self.loss(params, hparams, args, captured)


def _uncover(
    inner: Callable[..., Any], params: object, hparams: object, args: tuple[object, ...]
) -> tuple[Callable[..., Any], list[Any]]:
    """Return L as a function of what ``inner`` closes over, too, and the traced values that this is.

    A rule for derivatives must not close over them: JAX would take them to be constant, or find them leaked.
    """

    def split(hparams: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[Any], Any]:
        leaves, structure = jax.tree.flatten((hparams, args))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return arrays, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves], structure

    arrays, others, structure = split(hparams, args)

    def of_arrays(params: Any, arrays: list[Any]) -> Any:
        supply = iter(arrays)
        hparams, args = jax.tree.unflatten(structure, [next(supply) if x is None else x for x in others])
        value = inner(params, hparams, *args)
        check_scalar("inner", value)
        return value

    closed = jax.make_jaxpr(of_arrays)(params, arrays)
    traced = [isinstance(const, Tracer) for const in closed.consts]
    if not any(traced):
        return _Plain(inner), []

    def loss(params: Any, hparams: Any, args: tuple[Any, ...], captured: list[Any]) -> Any:
        supply = iter(captured)
        consts = [next(supply) if t else const for t, const in zip(traced, constants, strict=True)]
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((params, split(hparams, args)[0])))[0]

    constants = [None if t else const for t, const in zip(traced, closed.consts, strict=True)]
    return loss, [const for t, const in zip(traced, closed.consts, strict=True) if t]


def _uncover_options(solver: LinearSolver[Any]) -> tuple[Callable[[list[Any]], LinearSolver[Any]], list[Any]]:
    """Return the solver as a function of its options, and these, where some are traced."""
    options: list[Any] = []
    try:
        static = partition(solver, options)
    except TypeError:  # it cannot be rebuilt
        return lambda _: solver, []
    if not any(isinstance(option, Tracer) for option in options):
        return lambda _: solver, []
    return lambda options: combine(static, iter(options)), options


def _call(backend: JaxBackend, function: Callable[..., Any], *args: Any) -> Any:
    return function(backend, *args)


def _check(backend: JaxBackend, inner: Callable[..., Any], params: P, hparams: object, args: tuple[Any, ...]) -> None:
    slope = backend.inner_slope(inner, params, hparams, args)
    if not depends(lambda h: slope(params, h), hparams):
        raise ValueError(
            f"∂inner/∂params does not depend on {leaf_names(backend, 'hparams', hparams)}, so that these have no "
            "influence on the minimum. Use the hparams argument inside inner: the training's use of it does not count."
        )


def _solve(
    backend: JaxBackend,
    solver: LinearSolver[Any],
    inner: Callable[..., Any],
    params: P,
    hparams: object,
    args: tuple[Any, ...],
    rhs: P,
) -> tuple[P, SolverInfo]:
    A = LinearOperator(backend.space(params), backend.inner(inner, params, hparams, args).vjp_params)
    check_requirements(solver, A)
    return solver.solve(solver.init(A), A, rhs, None)


def _hvp(backend: JaxBackend, inner: Callable[..., Any], params: P, hparams: object, args: tuple[Any, ...], v: P) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    return jax.jvp(lambda w: slope(w, hparams), (params,), (v,))[1]


def _minus_jvp_hparams(
    backend: JaxBackend, inner: Callable[..., Any], params: P, hparams: object, args: tuple[Any, ...], u: object
) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    _, jvp_hparams = cross_products(slope, params, hparams)
    return backend.space(params).scale(-1.0, jvp_hparams(u))
