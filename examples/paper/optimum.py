"""The minimum of a small inner problem, to rounding: what a hypergradient is judged at."""

from typing import Any

import bilevel as bl
from bilevel import scipy_fit


def optimum(problem: bl.Problem, params: Any, hparams: Any, inner_args: tuple[Any, ...]) -> Any:
    """Return the params, a dict of arrays, with a gradient of norm 1e-10 at most: by L-BFGS, then Newton's method."""
    params = scipy_fit(problem, inner_args=inner_args, gtol=1e-6, maxiter=20_000)(hparams, params)
    return newton(problem, params, hparams, inner_args)


def newton(
    problem: bl.Problem, params: Any, hparams: Any, inner_args: tuple[Any, ...], gtol: float = 1e-10, steps: int = 20
) -> Any:
    """Return the params, a dict of arrays, after as many of Newton's steps as it takes.

    Newton's step is H⁻¹ ∂L/∂w, and so the adjoint of a problem whose outer objective is the inner one.

    Raises:
        RuntimeError: if the norm of the gradient stays above ``gtol``.
    """
    itself = bl.Problem(problem.inner, problem.inner)
    for _ in range(steps):
        step = bl.hypergradient(
            itself, params, hparams, inner_args=inner_args, outer_args=inner_args, solver="exact", on_failure="raise"
        )
        if step.info.rhs_norm <= gtol:
            return params
        params = {name: params[name] - step.adjoint[name] for name in params}
    raise RuntimeError(f"Newton's method left a gradient of norm {step.info.rhs_norm:.2g}.")
