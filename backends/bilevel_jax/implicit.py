"""Training functions that JAX differentiates by the implicit function theorem."""

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
    FIXED_POINT,
    ROOT,
    Condition,
    bind_arguments,
    check_training_result,
    minimum,
    params_noted,
    training_name,
)
from bilevel.validation import check_stateless, check_trees
from bilevel_jax.backend import backend
from bilevel_jax.closures import Call
from bilevel_jax.implicit_jvp import with_implicit_derivative


def implicit_minimizer(
    inner: Callable[..., object],
    solver: SolverSpec = "cg",
    *,
    prox: Callable[..., object] | None = None,
    step_size: float = 1.0,
    equality: Callable[..., object] | None = None,
    inequality: Callable[..., object] | None = None,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
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
        prox: the proximal operator of a convex function with kinks that w* minimizes in addition to L, such as
            ``bl.prox.l1()``, or a projection on a convex set. It is (v, hparams, step_size) -> a tree like params, as
            in `bl.Proximal`. The linear system is the symmetric one of `bl.Proximal`: for an L1 norm or bounds, the
            system on the support. Only first derivatives are right for `bl.prox.nuclear_norm`.
        step_size: of the proximal step, as in `bl.Proximal`. In float32, it should be near one over the largest
            curvature of L, if that is far from 1.
        equality, inequality: constraints equality(w, hparams, *args) = 0 and inequality(w, hparams, *args) <= 0, as in
            `bl.Constrained`. Then the training returns the params of `bl.Constrained`: a dict with "w" and the
            multipliers. ``inner`` receives w only. The linear system is indefinite: use "minres", "gmres" or "exact".
            Constraints that are about to become active are not found.
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
    condition, function = minimum(backend, inner, prox, step_size, equality, inequality)
    return _decorator(condition, function, solver, on_failure, has_aux)


def implicit_root(
    residual: Callable[..., object],
    solver: SolverSpec = "gmres",
    *,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
) -> Callable[[Callable[..., V]], Callable[..., V]]:
    """Return a decorator that makes a solver of equations differentiable, without differentiating the solver.

    The derivative of w*(λ), where residual(w*, λ) = 0, along a change u of λ is −[∂residual/∂w]⁻¹ (∂residual/∂λ) u, by
    the implicit function theorem. In reverse mode, the linear system is the transposed one, as in `bilevel.Root`. All
    modes, orders and transformations work as for `implicit_minimizer`.

    Args:
        residual: r(params, hparams, *args) -> a tree like params; a pure function. For an optimality condition, r is
            the gradient of a loss, but then `implicit_minimizer` uses the symmetry of its derivative.
        solver: a linear solver for systems that are not symmetric, in the forms of `implicit_minimizer`: "gmres",
            "bicgstab", "normal-cg", or "exact" for few unknowns.
        on_failure: as in `implicit_minimizer`.
        has_aux: as in `implicit_minimizer`.

    Returns:
        A decorator of ``my_solver(hparams, *args) -> params``, as in `implicit_minimizer`.

    Raises:
        TypeError: if the solver is not linear. When called: for arguments that do not fit the solver or ``residual``,
            and for leaves that are not floating-point arrays.
        ValueError: when called, if ``residual`` does not depend on params or hparams, or is not like params.
        SolverError: when differentiated, if a solve fails and ``on_failure`` requires an error.

    >>> import jax, jax.numpy as jnp
    >>> @implicit_root(lambda x, a: x**2 - a)
    ... def square_root(a):
    ...     return jnp.sqrt(a)
    >>> jax.grad(lambda a: square_root(a).sum())(jnp.array([4.0]))
    Array([0.25], dtype=...)
    """
    return _decorator(ROOT, residual, solver, on_failure, has_aux)


def implicit_fixed_point(
    step: Callable[..., object],
    solver: SolverSpec = "gmres",
    *,
    on_failure: OnFailure = "warn",
    has_aux: bool = False,
) -> Callable[[Callable[..., V]], Callable[..., V]]:
    """Return a decorator that makes an iteration differentiable by its fixed point, without differentiating the steps.

    The derivative of w*(λ), where w* = step(w*, λ), along a change u of λ is [I − ∂step/∂w]⁻¹ (∂step/∂λ) u (Bai, Kolter
    & Koltun, NeurIPS 2019, theorem 1). It is `implicit_root` of w − step(w, λ).

    Args:
        step: (params, hparams, *args) -> the next params, with the same structure, shapes and dtypes; a pure function.
            It may be a step of another algorithm than the one that found params, such as a proximal gradient step.
        solver: as in `implicit_root`. ``bl.Neumann(step_size=1.0)`` sums over the last ``terms`` steps.
        on_failure: as in `implicit_minimizer`.
        has_aux: as in `implicit_minimizer`.

    Returns:
        A decorator of ``my_solver(hparams, *args) -> params``, as in `implicit_minimizer`.

    Raises:
        TypeError, ValueError, SolverError: as in `implicit_root`.

    >>> import jax, jax.numpy as jnp
    >>> @implicit_fixed_point(lambda w, h: w / 2 + h)  # w* = 2 h
    ... def iterate(h):
    ...     return jax.lax.fori_loop(0, 50, lambda _, w: w / 2 + h, jnp.zeros_like(h))
    >>> jax.grad(lambda h: (iterate(h) ** 2).sum())(jnp.ones(1))
    Array([8.], dtype=...)
    """
    return _decorator(FIXED_POINT, step, solver, on_failure, has_aux)


def _decorator(
    condition: Condition, function: Callable[..., object], spec: SolverSpec, on_failure: OnFailure, has_aux: bool
) -> Callable[[Callable[..., V]], Callable[..., V]]:
    condition.check_function(function)
    check_on_failure(on_failure)
    linear_solver = get_linear_solver(spec, condition.decorator)
    check_stateless(backend, linear_solver)

    def decorate(*given: Callable[..., V], **options: object) -> Callable[..., V]:
        condition.check_training(function, *given, **options)
        [my_training] = given
        name = training_name(my_training)

        @wraps(my_training)
        def solve(*args: object, **named: object) -> Any:
            bound = bind_arguments(condition, my_training, function, args, named)
            check_trees(backend, {"hparams": bound.hparams}, {})
            # No derivative passes through the training: it does not depend on how w* was found.
            hparams, args, named = _constant((bound.hparams, bound.args, {**bound.shared, **bound.own}))
            found, aux = check_training_result(backend, name, my_training(hparams, *args, **named), has_aux)
            with params_noted(condition, name, found):
                call = Call(bound.args, bound.shared)
                params = with_implicit_derivative(
                    condition, function, linear_solver, on_failure, _constant(found), bound.hparams, call
                )
            return (params, _constant(aux)) if has_aux else params

        return solve

    return decorate


def _constant(tree: V) -> V:
    return jax.tree.map(lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
