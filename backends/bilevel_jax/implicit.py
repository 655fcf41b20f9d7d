"""A training function that JAX differentiates by the implicit function theorem."""

from collections.abc import Callable
from functools import wraps

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
    inner: Callable[..., object], solver: SolverSpec = "cg", *, on_failure: OnFailure = "warn"
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

    Returns:
        A decorator of ``my_training(hparams, *args) -> params``. hparams and params are trees of floating-point arrays;
        args are anything. The training receives values without derivatives: outside ``jit``, plain arrays.

    Raises:
        TypeError: if the solver is not linear. When called: for leaves that are not floating-point arrays.
        ValueError: when called, if L does not depend on params, or ∂L/∂w does not depend on hparams.
        SolverError: when differentiated, if a solve fails and ``on_failure`` requires an error.

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

    def decorate(my_training: Callable[..., V]) -> Callable[..., V]:
        result = f"{getattr(my_training, '__name__', type(my_training).__name__)}(...)"

        @wraps(my_training)
        def solve(hparams: object, *args: object) -> V:
            check_trees(backend, {"hparams": hparams}, {})
            # No derivative passes through the training: it does not depend on how the minimum was found.
            params = _constant(my_training(*_constant((hparams, *args))))
            if params is None:
                raise TypeError(f"{result} returned None. Return the trained params.")
            check_trees(backend, {result: params}, {})
            return with_implicit_jvp(inner, linear_solver, on_failure, params, hparams, args)

        return solve

    return decorate


def _constant(tree: V) -> V:
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
