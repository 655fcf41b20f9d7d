"""The minimum of a small inner problem, to rounding: what a hypergradient is judged at."""

from typing import Any

import bilevel as bl
from bilevel.fit import scipy_fit


def optimum(problem: bl.Problem, params: Any, hparams: Any, inner_args: tuple[Any, ...], gtol: float = 1e-10) -> Any:
    """Return the params, a dict of arrays, where no gradient is left: by L-BFGS, then by Newton's method.

    Newton's step is H⁻¹ ∂L/∂w, and so the adjoint of a problem whose outer objective is the inner one.

    Raises:
        RuntimeError: if the gradient stays above ``gtol``.
    """
    itself = bl.Problem(problem.inner, problem.inner)
    params = scipy_fit(problem, inner_args=inner_args, gtol=1e-6, maxiter=20_000)(hparams, params)
    for _ in range(20):
        newton = bl.hypergradient(
            itself, params, hparams, inner_args=inner_args, outer_args=inner_args, solver="exact", on_failure="raise"
        )
        if newton.info.rhs_norm <= gtol:
            return params
        params = {name: params[name] - newton.adjoint[name] for name in params}
    raise RuntimeError(f"Newton's method left a gradient of norm {newton.info.rhs_norm:.2g}.")
