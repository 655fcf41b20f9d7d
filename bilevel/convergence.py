"""What a failed solve says: what happened, why, and the way out."""

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from bilevel.errors import SolverError, SolverWarning
from bilevel.operators.lanczos import Spectrum
from bilevel.protocols import Backend
from bilevel.results import SolverInfo, Status

OnFailure = Literal["raise", "warn", "ignore"]
UNKNOWN = Spectrum(*[math.nan] * 4)  # where nothing can be measured


def check_on_failure(on_failure: str) -> None:
    """Raise a ValueError unless this is one of the three words."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f'on_failure: expected "raise", "warn" or "ignore", got {on_failure!r}.')


def conclude(
    backend: Backend,
    info: SolverInfo,
    solver: Any,
    on_failure: OnFailure,
    curvature: Callable[[], Spectrum | None],
    hint: str = "",
) -> SolverInfo:
    """Bring a solve's info to the host, unless it is traced, and warn or raise if the solve failed.

    A result that is not finite raises even where a warning was asked for. ``curvature`` returns the spectrum of the
    undamped Hessian, in scalars of the backend, or None where it is not symmetric, or `UNKNOWN`; only called if needed.
    """
    steps, residual_norm, rhs_norm, status = (backend.to_host(x) for x in info)
    if status is None:
        return info
    info = SolverInfo(int(steps), residual_norm, rhs_norm, Status(int(status)))
    if on_failure == "ignore" or info.status == Status.CONVERGED:
        return info

    def on_host() -> Spectrum | None:
        found = curvature()
        return found if found is None or found is UNKNOWN else Spectrum(*map(backend.to_host, found))

    message = explain(info, solver, on_host) + hint
    if on_failure == "raise" or info.status == Status.NON_FINITE:
        raise SolverError(message)
    warnings.warn(SolverWarning(message), stacklevel=callers_level())
    return info


def callers_level() -> int:
    """Return the stacklevel, for a warning one function up, of the line that called this library or a backend of it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("bilevel"):
        level, frame = level + 1, frame.f_back
    return level


def explain(info: SolverInfo, solver: Any, curvature: Callable[[], Spectrum | None]) -> str:
    """Say how a solve failed and what to do; see `conclude`, but all is on the host."""
    solver = getattr(solver, "solver", solver)  # in a WarmStart
    damping = float(getattr(solver, "damping", 0.0))
    if info.status == Status.MAXITER:
        message = _maxiter(info, solver)
    elif info.status == Status.NON_FINITE:
        message = _non_finite(info)
    elif getattr(solver, "optimizer", None) == "adam":
        message = (
            f"diverged: Adam's steps drive apart what they start from, with a {_residual(info)} after {info.steps}. "
            "Use a smaller step_size, a larger eps (its step is near a sign where gradients are small), or truncation."
        )
    elif (ends := curvature()) is None:
        message = _no_contraction(info)
    else:
        # Estimates lie inside the spectrum: if one is below zero, so is an eigenvalue. Its error bound proves nothing.
        smallest = ends.smallest - ends.smallest_error if ends.smallest < 0 else ends.smallest
        sentence = _negative_curvature if info.status == Status.NEGATIVE_CURVATURE else _diverged
        message = sentence(info, smallest, ends.largest + ends.largest_error, damping)
    return f"{type(solver).__name__}: {message}"


def _residual(info: SolverInfo) -> str:
    return f"residual {info.residual_norm:.2g} of a right-hand side of {info.rhs_norm:.2g}"


def _maxiter(info: SolverInfo, solver: Any) -> str:
    maxiter, remedy = getattr(solver, "maxiter", None), getattr(solver, "remedy", "Add damping.")
    if maxiter is None:
        return f"did not solve the system: a {_residual(info)} is left. {remedy}"
    if info.steps < maxiter:
        advice = "Raise restart, l" if hasattr(solver, "restart") else "L"
        return (
            f"stagnated after {info.steps} steps above its tolerance, with a {_residual(info)}: a singular or "
            f"ill-conditioned Hessian, or the precision of the dtype, keeps it out of reach. {advice}oosen rtol, add "
            "damping, or use float64."
        )
    return f"stopped after {info.steps} steps above its tolerance, with a {_residual(info)}. {remedy}"


def _negative_curvature(info: SolverInfo, smallest: float, largest: float, damping: float) -> str:
    if smallest < -1e-6 * largest:
        spectrum, needed = f" (eigenvalues from about {smallest:.2g} to {largest:.2g})", -smallest
    elif largest > 0:  # too close to zero, or too rare, for a few products to tell
        spectrum, needed = f" (largest eigenvalue about {largest:.2g}, smallest one zero or just below)", 1e-3 * largest
    else:
        spectrum, needed = "", 0.0
    # The estimate errs towards zero: damping that is there already has been found to be too little.
    needed = max(needed, damping)
    advice = f"damping above {needed:.2g}" if needed else "damping"
    return (
        f"met non-positive curvature at step {info.steps} and stopped before it, with a {_residual(info)}. The Hessian "
        f"is not positive definite{spectrum}: {'raise' if damping else 'add'} {advice}, "
        'train the inner problem further, use solver="minres", which takes eigenvalues of either sign, or the '
        "Gauss-Newton matrix in place of the Hessian (bl.Problem.from_model)."
    )


def _diverged(info: SolverInfo, smallest: float, largest: float, damping: float) -> str:
    message = f"diverged at step {info.steps}, with a {_residual(info)}. "
    if math.isnan(largest):
        return message + (
            "Its step_size must stay below 2 over the largest eigenvalue of the Hessian, and none may be "
            'negative: use step_size="auto", or add damping.'
        )
    if smallest + damping < -1e-6 * abs(largest):
        return message + (
            f"The Hessian has a negative eigenvalue (about {smallest:.2g}), so that no step size holds: add "
            f"damping above {-smallest:.2g}, or train the inner problem further."
        )
    top = largest + damping
    return message + (
        f"The largest eigenvalue of the Hessian{' with its damping' if damping else ''} is about {top:.3g}: use "
        f'step_size={1 / top:.2g} (it must stay below {2 / top:.2g}), or step_size="auto".'
    )


def _no_contraction(info: SolverInfo) -> str:
    return (
        f"diverged at step {info.steps}, with a {_residual(info)}. A fixed point's step, or w − step_size·residual "
        'of a root, does not contract at params, so that its series has no sum: use solver="gmres", add damping, or '
        "look whether params is the solution."
    )


def _non_finite(info: SolverInfo) -> str:
    return (
        f"nan or inf in the losses, their gradients or a Hessian-vector product (found at step {info.steps}); no "
        "hypergradient is returned. Look for overflow in the inner problem, hyperparameters that ran away (a "
        "penalty exp(λ) with a large λ), or an inner training that diverged. "
        'on_failure="ignore" returns the nan.'
    )
