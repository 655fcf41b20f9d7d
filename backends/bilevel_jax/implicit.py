"""A training function that JAX differentiates by the implicit function theorem."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax import lax

from bilevel.config import get_linear_solver
from bilevel.convergence import OnFailure, check_on_failure
from bilevel.hypergradient import SolverSpec
from bilevel.spaces.array import V
from bilevel.validation import check_stateless, check_trees
from bilevel_jax.backend import backend
from bilevel_jax.implicit_jvp import with_implicit_jvp


def implicit_minimizer(
    inner: Callable[..., Any], solver: SolverSpec = "cg", *, on_failure: OnFailure = "warn"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a training function differentiable, without differentiating the training.

    Of w*(λ) = argmin over w of L(w, λ), the derivative along a change u of λ is −[∂²L/∂w²]⁻¹ (∂²L/∂λ∂w) u (Lorraine,
    Vicol & Duvenaud, AISTATS 2020, theorem 1). So ``jax.grad(lambda h: outer(solve(h, x, y), x_val, y_val))(h)``
    is the hypergradient: one training, one linear solve and one cross product, as in `bl.hypergradient`. Forward mode,
    ``jit``, ``vmap`` and derivatives of the derivative work as well; those beyond the first take w* to be a
    minimum, and the solve to be exact.

    λ is all that varies: hparams, every floating-point array among the arguments (the data, say), and what ``inner``
    closes over while JAX differentiates it. What influences the training but not L, such as its start or its
    learning rate, has no influence on a minimum: its derivative is zero. So are those by the options of the solver.

    A failed solve has no status to report: there is a warning, or an error, from a callback. Outside ``jit`` it is a
    `SolverError`. Inside, JAX makes of it an error of its own with the same text, which may only come when the
    result is read.

    Args:
        inner: L(params, hparams, *args) -> a scalar; pure.
        solver: a linear solver, for v: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        on_failure: what to do unless a solve converged: "raise", "warn" or "ignore". "warn" raises all the same
            where the result is not finite.

    Returns:
        A decorator of ``my_training(hparams, *args) -> params``. Both are trees of floating-point arrays; among the
        arguments, there may be anything. The training sees values without derivatives: outside ``jit``, plain arrays.

    Raises:
        TypeError: if the solver is no linear one. When called: for leaves that are no floating-point arrays.
        ValueError: when called, if L does not depend on params, or ∂L/∂w not on hparams.
        SolverError: when differentiated, if a solve failed and ``on_failure`` says so.

    >>> import jax, jax.numpy as jnp
    >>> @implicit_minimizer(lambda w, h, y: jnp.sum((w - y) ** 2 + jnp.exp(h) * w**2))
    ... def ridge(h, y):
    ...     return y / (1 + jnp.exp(h))
    >>> jax.grad(lambda h: ridge(h, jnp.ones(1)).sum())(jnp.zeros(1))
    Array([-0.25], dtype=...)
    """
    check_on_failure(on_failure)
    linear_solver = get_linear_solver(solver, "implicit_minimizer")
    check_stateless(backend, linear_solver)

    def decorate(my_training: Callable[..., Any]) -> Callable[..., Any]:
        result = f"{getattr(my_training, '__name__', type(my_training).__name__)}(...)"

        @wraps(my_training)
        def solve(hparams: object, *args: object) -> Any:
            check_trees(backend, {"hparams": hparams}, {})
            # It sees values, and its result is one: how a minimum was found matters to no derivative.
            params = _constant(my_training(*_constant((hparams, *args))))
            if params is None:
                raise TypeError(f"{result} returned None: return the trained params.")
            check_trees(backend, {result: params}, {})
            return with_implicit_jvp(inner, linear_solver, on_failure, params, hparams, args)

        return solve

    return decorate


def _constant(tree: V) -> V:
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
