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
from bilevel.trainings import (
    bind_arguments,
    check_inner,
    check_training,
    check_training_result,
    training_name,
    tuples_noted,
)
from bilevel.validation import check_stateless, check_trees
from bilevel_jax.backend import backend
from bilevel_jax.closures import Call
from bilevel_jax.implicit_jvp import with_implicit_derivative


def implicit_minimizer(
    inner: Callable[..., object], solver: SolverSpec = "cg", *, on_failure: OnFailure = "warn", has_aux: bool = False
) -> Callable[[Callable[..., V]], Callable[..., V]]:
    """Return a decorator that makes a training function differentiable, without differentiating the training.

    The derivative of w*(λ) = argmin over w of L(w, λ) along a change u of λ is −[∂²L/∂w²]⁻¹ (∂²L/∂λ∂w) u (Lorraine,
    Vicol & Duvenaud, AISTATS 2020, theorem 1). So ``jax.grad(lambda h: outer(solve(h, x, y), x_val, y_val))(h)`` is the
    hypergradient. It takes one training, one linear solve and one cross product, as in `bl.hypergradient`. Forward
    mode, ``jit``, ``vmap`` and higher derivatives also work. Higher derivatives assume that w* is a minimum and that
    the solve is exact.

    λ stands for hparams, every floating-point array among the arguments (for example, the data), and the traced values
    that ``inner`` closes over. The start and the learning rate of the training do not change the minimum, so their
    derivatives are zero. The derivatives by the solver's options are also zero.

    A failed solve is reported by a callback, as a warning or an error. Outside ``jit``, the error is a `SolverError`.
    Inside ``jit``, JAX raises its own error with the same text, perhaps only when the result is read.

    Args:
        inner: L(params, hparams, *args) -> scalar; a pure function.
        solver: a linear solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object.
        on_failure: "raise", "warn" or "ignore", for a solve that does not converge. "warn" raises if the result is not
            finite.
        has_aux: whether the training returns ``(params, aux)``, where aux is any tree, such as a history of losses. The
            result is ``(params, aux)`` too. aux has no derivative.

    Returns:
        A decorator of ``my_training(hparams, *args) -> params``. hparams and params are trees of floating-point arrays;
        args are anything. The training receives values without derivatives: outside ``jit``, plain arrays. Keyword
        arguments and defaults of the training reach ``inner`` under their names if it has parameters of these names.

    Raises:
        TypeError: if the solver is not linear. When called: for arguments that do not fit the training or ``inner``,
            and for leaves that are not floating-point arrays. When differentiated: if JAX has no second derivative of
            L. If L has no forward mode, because of a `jax.custom_vjp` inside it, the result has only a reverse mode.
        ValueError: when called, if L does not depend on params, or ∂L/∂w does not depend on hparams.
        SolverError: when differentiated, if a solve fails and ``on_failure`` requires an error.

    >>> import jax, jax.numpy as jnp
    >>> @implicit_minimizer(lambda w, h, y: jnp.sum((w - y) ** 2 + jnp.exp(h) * w**2))
    ... def ridge(h, y):
    ...     return y / (1 + jnp.exp(h))
    >>> jax.grad(lambda h: ridge(h, jnp.ones(1)).sum())(jnp.zeros(1))
    Array([-0.25], dtype=...)
    """
    check_inner(inner)
    check_on_failure(on_failure)
    linear_solver = get_linear_solver(solver, "implicit_minimizer")
    check_stateless(backend, linear_solver)

    def decorate(*given: Callable[..., V], **options: object) -> Callable[..., V]:
        check_training(inner, *given, **options)
        [my_training] = given
        name = training_name(my_training)

        @wraps(my_training)
        def solve(*args: object, **named: object) -> Any:
            bound = bind_arguments(my_training, inner, args, named)
            check_trees(backend, {"hparams": bound.hparams}, {})
            # No derivative passes through the training: it does not depend on how the minimum was found.
            hparams, args, named = _constant((bound.hparams, bound.args, {**bound.shared, **bound.own}))
            found, aux = check_training_result(backend, name, my_training(hparams, *args, **named), has_aux)
            with tuples_noted(name, found):
                call = Call(bound.args, bound.shared)
                params = with_implicit_derivative(
                    inner, linear_solver, on_failure, _constant(found), bound.hparams, call
                )
            return (params, _constant(aux)) if has_aux else params

        return solve

    return decorate


def _constant(tree: V) -> V:
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
