"""Solve a proximal or projected inner problem by the accelerated proximal gradient method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

from bilevel.backend import Backend
from bilevel.errors import SolverWarning
from bilevel.linear_solvers.neumann import safe_step
from bilevel.messages import callers_level, counted
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.gradients import in_params
from bilevel.problems.proximal import Projected, Proximal
from bilevel.spaces.array import Args, Array, Number, P
from bilevel.validation import check_inputs, find_backend, wrong_calls_named

ROUNDING = 10.0  # machine epsilons: a step that is shorter, relative to params, is rounding
SHRINK = 0.9  # of the step size that the curvature allows


def proximal_fit(
    problem: Proximal | Projected,
    *,
    inner_args: Args = (),
    gtol: float = 1e-8,
    maxiter: int = 10_000,
    backend: Backend | str | None = None,
) -> Callable[[object, P], P]:
    """Return ``fit(hparams, params0) -> params``, which solves the inner problem of a `Proximal` or `Projected`.

    Use it as the ``fit`` of `bilevel.search.minimize`. It is the accelerated proximal gradient method, FISTA (Beck &
    Teboulle, SIAM J. Imaging Sciences 2009), with the adaptive restart of O'Donoghue & Candès (2015, gradient scheme).
    The first step size is 1/(largest eigenvalue of ∂²smooth/∂w² at ``params0``), by Lanczos' method. It shrinks if the
    gradients show a larger curvature. Each iteration takes one gradient and one proximal operator. The step size of
    the problem plays no part.

    Args:
        problem: the problem.
        inner_args: further arguments of the smooth objective: a tuple or `MicroBatches`.
        gtol: stop if no entry of (w − prox(w − s ∇smooth))/s is larger, or if it is rounding. Without kinks and
            constraints, it is the gradient.
        maxiter: maximum number of iterations.
        backend: as in `bilevel.hypergradient`.

    Returns:
        The function. JAX compiles it to one loop. It warns (`SolverWarning`) if it does not reach ``gtol`` within
        ``maxiter`` iterations, unless it is traced.

    Raises:
        TypeError: if the problem is of another kind. The function raises TypeError or ValueError for invalid input.

    >>> import numpy as np, bilevel as bl
    >>> quadratic = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.zeros(2))
    >>> problem = bl.Projected(quadratic.inner, bl.projections.nonnegative(), quadratic.outer)
    >>> proximal_fit(problem)(np.array([2.0, -4.0]), np.zeros(2))
    array([2., 0.])
    """
    if not isinstance(problem, Proximal | Projected):
        raise TypeError(
            f"proximal_fit solves the inner problem of a bl.Proximal or bl.Projected, got {type(problem).__name__}. "
            "For a bl.Problem, use bl.scipy_fit."
        )

    def fit(hparams: object, params0: P) -> P:
        if params0 is None:
            raise ValueError("params0: the fit needs a start, as in bl.minimize(..., params0=np.zeros(10)).")
        backend_ = find_backend(backend, params0, hparams)
        (args,) = check_inputs(backend_, params0, hparams, inner_args)
        with wrong_calls_named(problem, args, None):
            params, steps, size = backend_.run(_fit, problem, params0, hparams, args, gtol, maxiter)
        left = backend_.to_host(size)
        if left is not None and not left <= gtol:
            _warn(int(backend_.to_host(steps)), left, gtol)
        return params

    return fit


class _State(NamedTuple, Generic[P]):
    """The state of the iteration.

    Attributes:
        w: the last iterate.
        y: the extrapolated point, where the next step starts.
        grad: ∇smooth at y.
        t: FISTA's momentum parameter.
        step: the step size s.
        size: the largest entry of (y − w)/s of the last step; 0 if it is rounding.
        steps: number of iterations.
    """

    w: P
    y: P
    grad: P
    t: Array
    step: Array
    size: Array
    steps: Array


def _fit(
    backend: Backend, problem: Proximal | Projected, params0: P, hparams: Any, args: Args, gtol: Number, maxiter: int
) -> tuple[P, Array, Array]:
    """Return params, the number of iterations, and the largest entry of the residual in the units of a gradient."""
    space = backend.space(params0)
    xp, dot = space.xp, space.dot

    def gradient(w: P) -> P:
        return in_params(backend, problem.smooth, w, hparams, args).grad_params

    def body(s: _State[P]) -> _State[P]:
        w = problem.step(s.y, s.grad, hparams, space, s.step)
        back = space.subtract(s.y, w)
        moved = space.subtract(w, s.w)
        restart = dot(back, moved) > 0
        t = xp.where(restart, 1.0, (1 + xp.sqrt(1 + 4 * s.t**2)) / 2)
        y = space.axpy(xp.where(restart, 0.0, (s.t - 1) / t), moved, w)
        grad = gradient(y)
        along = space.subtract(y, s.y)
        length, curved = dot(along, along), dot(along, space.subtract(grad, s.grad))
        # The curvature between the two points is more than 1/s. For points that are too close, it is rounding.
        too_long = (curved * s.step > length) & (length > space.eps * dot(y, y))
        step = xp.where(too_long, SHRINK * length / xp.where(too_long, curved, 1.0), s.step)
        farthest = space.max_abs(back)
        rounding = farthest <= ROUNDING * space.eps * space.max_abs(w)
        size = xp.where(rounding, 0.0, farthest / s.step)
        new = _State(w, y, grad, xp.where(too_long, 1.0, t), step, size, s.steps + 1)
        return space.where(s.size > gtol, new, s)  # a loop may read its flag late

    at = backend.inner(problem.smooth, params0, hparams, args)
    one = xp.ones_like(dot(params0, params0))
    step = safe_step(LinearOperator(space, at.vjp_params)) * one
    infinite, zero = one * float("inf"), xp.zeros_like(one, dtype=xp.int32)
    s = _State(params0, params0, at.residual, one, step, infinite, zero)
    s = space.while_loop(lambda s: s.size > gtol, body, s, maxiter)
    return s.w, s.steps, s.size


def _warn(steps: int, left: float, gtol: float) -> None:
    message = (
        f"proximal_fit stopped after {counted(steps, 'iteration')} with a residual entry of {left:.2g} (gtol: "
        f"{gtol:.2g}). A hypergradient needs an accurate solution: raise maxiter or gtol, use float64, or keep the "
        "hyperparameters within bounds."
    )
    warnings.warn(SolverWarning(message), stacklevel=callers_level())
