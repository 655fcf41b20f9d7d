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

from bilevel.backend import R
from bilevel.convergence import OnFailure, report
from bilevel.linear_solvers.linear_solver import LinearSolver, check_requirements
from bilevel.methods.implicit import Implicit
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo
from bilevel.spaces.array import Args, H, P, V
from bilevel.validation import check_scalar, leaf_names
from bilevel_jax.backend import JaxBackend, backend, cross_products
from bilevel_jax.dependence import depends
from bilevel_jax.failure_callback import tell_failure
from bilevel_jax.partition import Static, combine, partition
from bilevel_jax.sharding import unvarying


def with_implicit_jvp(
    inner: Callable[..., object],
    solver: LinearSolver[object],
    on_failure: OnFailure,
    params: P,
    hparams: object,
    args: Args,
) -> P:
    """Return params, which JAX then differentiates as the minimizer of inner(params, hparams, *args).

    One rule, for a change of any of the arrays, gives all modes. For reverse mode, JAX transposes the rule, and the
    linear solve becomes the solve for the adjoint. For higher orders, JAX differentiates the rule.
    """
    loss, captured = _uncover(inner, params, hparams, args)
    make_solver, options = _uncover_options(solver)
    leaves, structure = jax.tree.flatten((hparams, args, captured, options))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    others = [None if array else leaf for array, leaf in zip(is_array, leaves, strict=True)]

    # A loss with captured values is made for this call, so a cache would not help.
    call = partial(_call, backend) if captured else backend.compiled
    call(_check, loss, params, hparams, (args, captured))

    @jax.custom_jvp
    def attach(params: P, arrays: list[jax.Array]) -> P:
        return params

    @partial(attach.defjvp, symbolic_zeros=True)
    def _(primals: tuple[P, list[jax.Array]], tangents: tuple[P, list[jax.Array | SymbolicZero]]) -> tuple[P, P]:
        params = attach(*primals)  # keeps its derivative, for derivatives of this rule
        arrays, changes = iter(primals[1]), iter(tangents[1])
        leaves = [next(arrays) if array else leaf for array, leaf in zip(is_array, others, strict=True)]
        moves = {i: next(changes) for i, array in enumerate(is_array) if array}
        moves = {i: u for i, u in moves.items() if not isinstance(u, SymbolicZero) and u.dtype != float0}
        if not moves:
            return params, jax.tree.map(jnp.zeros_like, params)

        moving = _Moving(loss, structure, tuple(moves))
        constants = [leaf for i, leaf in enumerate(leaves) if i not in moves]
        here = (moving, params, [leaves[i] for i in moves], (constants,))
        options = jax.tree.unflatten(structure, leaves)[-1]
        solver = make_solver(options)

        def tell(info: SolverInfo, options: list[object]) -> None:
            solver = make_solver(options)  # with numbers in place of tracers
            report(backend, info, Implicit(solver), on_failure, hint=" Run bl.diagnose for details.")

        def solve(_: object, rhs: P) -> P:
            x, info = call(_solve, solver, *here, rhs)
            if on_failure != "ignore":
                tell_failure(tell, lambda status: solver.failed(status), info, options)
            return x

        # JAX cannot transpose a solve in which only some leaves move, for example if weights have a penalty and a bias
        # has none. So all leaves are tied together wherever they can be a right-hand side.
        rhs = _tied(call(_minus_jvp_hparams, *here, list(moves.values())))
        change = lax.custom_linear_solve(lambda v: _tied(call(_hvp, *here, v)), rhs, solve, symmetric=True)
        return params, unvarying(_tied(change), params)

    return attach(params, [leaf for array, leaf in zip(is_array, leaves, strict=True) if array])


def _tied(tree: V) -> V:
    """Return a tree in which each leaf is a linear function of all leaves: add a sum whose value is set to zero.

    The barrier keeps the leaves together, but it is not enough: from JAX 0.11.2 on, the transpose of a barrier fails if
    one operand is a constant. The selection stops nan, and XLA removes it.
    """
    sums = [jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]
    zero = sum(lax.select(jnp.zeros_like(total, bool), total, jnp.zeros_like(total)) for total in sums)
    return lax.optimization_barrier(jax.tree.map(lambda leaf: leaf + jnp.asarray(zero, leaf.dtype), tree))


@dataclass(frozen=True)
class _Plain(Static):
    """(w, λ, args, captured) -> L, for an ``inner`` that captures no traced values."""

    inner: Callable[..., object]

    def __call__(self, params: object, hparams: object, args: Args, captured: list[jax.Array]) -> object:
        return self.inner(params, hparams, *args)


@dataclass(frozen=True)
class _Moving(Static):
    """L as a function of w and of the other leaves that move, given by their places. The key of a cached jit."""

    loss: Callable[..., object]
    structure: Any
    places: tuple[int, ...]

    def __call__(self, params: object, moving: list[jax.Array], constants: Sequence[object]) -> object:
        leaves = list(constants)
        for i, leaf in zip(self.places, moving, strict=True):
            leaves.insert(i, leaf)
        hparams, args, captured, _ = jax.tree.unflatten(self.structure, leaves)
        return self.loss(params, hparams, args, captured)


def _uncover(
    inner: Callable[..., object], params: object, hparams: object, args: Args
) -> tuple[Callable[..., object], list[jax.Array]]:
    """Return L as a function that also takes the traced values that ``inner`` captures, and these values.

    A rule for derivatives must not capture them: JAX would treat them as constants, or raise an error for a leak.
    """

    def split(hparams: object, args: Args) -> tuple[list[jax.Array], list[object], Any]:
        leaves, structure = jax.tree.flatten((hparams, args))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return arrays, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves], structure

    arrays, others, structure = split(hparams, args)

    def of_arrays(params: object, arrays: list[jax.Array]) -> object:
        supply = iter(arrays)
        hparams, args = jax.tree.unflatten(structure, [next(supply) if x is None else x for x in others])
        value = inner(params, hparams, *args)
        check_scalar("inner", value)
        return value

    closed = jax.make_jaxpr(of_arrays)(params, arrays)
    traced = [isinstance(const, Tracer) for const in closed.consts]
    if not any(traced):
        return _Plain(inner), []

    def loss(params: object, hparams: object, args: Args, captured: list[jax.Array]) -> object:
        supply = iter(captured)
        consts = [next(supply) if t else const for t, const in zip(traced, constants, strict=True)]
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((params, split(hparams, args)[0])))[0]

    constants = [None if t else const for t, const in zip(traced, closed.consts, strict=True)]
    return loss, [const for t, const in zip(traced, closed.consts, strict=True) if t]


def _uncover_options(
    solver: LinearSolver[object],
) -> tuple[Callable[[list[object]], LinearSolver[object]], list[object]]:
    """Return the solver as a function of its options, and the options if some are traced."""
    options: list[object] = []
    try:
        static = partition(solver, options)
    except TypeError:  # the solver cannot be rebuilt
        return lambda _: solver, []
    if not any(isinstance(option, Tracer) for option in options):
        return lambda _: solver, []
    return lambda options: combine(static, iter(options)), options


def _call(backend: JaxBackend, function: Callable[..., R], *args: object) -> R:
    return function(backend, *args)


def _check(backend: JaxBackend, inner: Callable[..., object], params: object, hparams: object, args: Args) -> None:
    slope = backend.inner_slope(inner, params, hparams, args)
    if not depends(lambda h: slope(params, h), hparams):
        raise ValueError(
            f"∂inner/∂params does not depend on {leaf_names(backend, 'hparams', hparams)}, so these have no influence "
            "on the minimum. Use the hparams argument inside inner: the training's use of it does not count."
        )


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
    check_requirements(solver, A)
    return solver.solve(solver.init(A), A, rhs, None)


def _hvp(backend: JaxBackend, inner: Callable[..., object], params: P, hparams: object, args: Args, v: P) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    return jax.jvp(lambda w: slope(w, hparams), (params,), (v,))[1]


def _minus_jvp_hparams(backend: JaxBackend, inner: Callable[..., object], params: P, hparams: H, args: Args, u: H) -> P:
    slope = backend.inner_slope(inner, params, hparams, args)
    _, jvp_hparams = cross_products(slope, params, hparams)
    return backend.space(params).scale(-1.0, jvp_hparams(u))
