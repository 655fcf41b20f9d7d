"""Solve the inner problem with SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.errors import SolverWarning
from bilevel.messages import callers_level
from bilevel.problems.protocols import BilevelProblem, is_equation
from bilevel.spaces.array import Args, Array, P
from bilevel.validation import check_inputs, find_backend, wrong_calls_named


def scipy_fit(
    problem: BilevelProblem,
    *,
    inner_args: Args = (),
    method: str = "L-BFGS-B",
    gtol: float = 1e-8,
    maxiter: int = 2000,
    options: Mapping[str, object] | None = None,
    backend: Backend | str | None = None,
) -> Callable[[object, P], P]:
    """Return ``fit(hparams, params0) -> params``, which minimizes the inner objective from ``params0``.

    Use it as the ``fit`` of `bilevel.search.minimize`, in place of a training loop. It is a full-batch method: the
    backend computes the loss and its gradient over all of ``inner_args``, in the dtype of ``params0``. SciPy stores its
    vectors on the host, in float64.

    Args:
        problem: the problem with the inner objective, also `bilevel.problems.k_fold`, whose folds it solves together.
        inner_args: further arguments of the inner objective.
        method: a method of `scipy.optimize.minimize` with an option ``gtol``, such as L-BFGS-B, BFGS or CG.
        gtol: stop if no entry of the gradient is larger, or if rounding prevents a decrease of the loss.
        maxiter: maximum number of iterations.
        options: further options of the method.
        backend: as in `bilevel.hypergradient`.

    Returns:
        The function. It warns (`SolverWarning`) if the gradient stays above ``gtol``, because a hypergradient is only
        defined at a minimum. It does not warn if rounding stops it within eps^(3/4) of the loss of the minimum. It
        warns again only if the gradient is ten times larger.

    Raises:
        TypeError: if the problem has no inner objective. The function raises TypeError or ValueError for invalid input.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.zeros(2))
    >>> scipy_fit(problem)(np.array([2.0, 4.0]), np.zeros(2))
    array([1., 2.])
    """
    if getattr(problem, "kind", None) == "proximal":
        raise TypeError(
            f"scipy_fit minimizes smooth objectives, and {type(problem).__name__} has kinks or a constraint: use "
            "bl.proximal_fit(problem, inner_args=...)."
        )
    if getattr(problem, "kind", None) == "constrained":
        raise TypeError("scipy_fit minimizes without constraints: use bl.constrained_fit(problem, inner_args=...).")
    if not isinstance(problem, BilevelProblem) or is_equation(problem):
        raise TypeError(
            f"scipy_fit minimizes an inner objective, which {type(problem).__name__} does not have: write a function "
            "fit(hparams, params0) -> params, which for example repeats the step until it converges."
        )
    worst = 0.0

    def fit(hparams: object, params0: P) -> P:
        nonlocal worst
        if params0 is None:
            raise ValueError("params0: the fit needs a start, as in bl.minimize(..., params0=np.zeros(10)).")
        backend_ = find_backend(backend, params0, hparams)
        check_inputs(backend_, params0, hparams, inner_args)
        space = backend_.space(params0)

        def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
            flat = backend_.from_numpy(x)
            with wrong_calls_named(problem, inner_args, None):
                value, grad = backend_.run(_value_and_grad, problem, flat, params0, hparams, inner_args)
            return float(backend_.to_host(value)), backend_.to_numpy(grad).astype(np.float64)

        found = scipy.optimize.minimize(
            value_and_grad,
            backend_.to_flat(params0),
            jac=True,
            method=method,
            options={"gtol": gtol, "maxiter": maxiter, **_OPTIONS.get(method.lower(), {}), **(options or {})},
        )
        slope = float(np.abs(found.jac).max())
        ended_by_rounding = found.nit < maxiter and _left(found) <= space.eps**0.75 * abs(found.fun)
        if not (slope <= max(gtol, 10 * worst) or ended_by_rounding):
            worst = slope
            _warn(found, slope, gtol)
        return space.unravel(backend_.from_numpy(found.x))

    return fit


_OPTIONS = {"l-bfgs-b": {"ftol": 0.0, "maxfun": 10**9}}  # stop only by gtol or maxiter


def _value_and_grad(
    backend: Backend, problem: BilevelProblem, flat: Array, like: object, hparams: object, inner_args: Args
) -> tuple[Array, Array]:
    """Return the inner objective and its gradient at flat params. JAX compiles this function once for all fits."""
    space = backend.space(like)
    value, grad = problem.value_and_residual(backend, space.unravel(flat), hparams, inner_args)
    assert value is not None  # only an equation has none
    return value, space.ravel(grad)


def _left(found: scipy.optimize.OptimizeResult) -> float:
    """Estimate the distance of the loss from its minimum, ½ gᵀH⁻¹g, with H from the method, or else the identity."""
    newton_step = found.hess_inv @ found.jac if "hess_inv" in found else found.jac
    return 0.5 * float(found.jac @ newton_step)


def _warn(found: scipy.optimize.OptimizeResult, slope: float, gtol: float) -> None:
    message = (
        f"scipy_fit stopped after {found.nit} iterations with a gradient entry of {slope:.2g} (gtol: {gtol:.2g}; "
        f"SciPy: {str(found.message).rstrip(': ')}). A hypergradient needs an accurate minimum: raise maxiter or gtol, "
        "use float64, or keep the hyperparameters within bounds."
    )
    warnings.warn(SolverWarning(message), stacklevel=callers_level())
