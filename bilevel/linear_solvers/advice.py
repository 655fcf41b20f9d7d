"""Messages about failed solves. A text without numbers stays the same, so Python shows its warning once per place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel.messages import counted
from bilevel.operators.lanczos import Spectrum
from bilevel.results import SolverInfo, Status

if TYPE_CHECKING:
    from bilevel.linear_solvers.linear_solver import LinearSolver


def explain(solver: LinearSolver[Any], info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
    """Return the failure and its remedy; see `LinearSolver.explain`."""
    if info.status == Status.NON_FINITE:
        return NON_FINITE
    if info.status == Status.MAXITER:
        return _maxiter(solver, info)
    if not symmetric:
        return NO_CONTRACTION
    damping = float(info.damping)
    if info.status == Status.NEGATIVE_CURVATURE:
        return _negative_curvature(damping, curvature, isinstance(solver.damping, str))
    return diverged(damping, curvature)


NON_FINITE = (
    "nan or infinity in the losses, their gradients, a product or the solve. Check for overflow in the inner problem, "
    "very large hyperparameters (a penalty exp(λ) with a large λ), or an inner training that diverged."
)
NO_CONTRACTION = (
    "diverged. The step of the fixed point, or w − step_size·residual of the root, does not contract at params, so "
    'the series has no sum. Use solver="gmres", add damping, or check whether params is the solution.'
)


def _maxiter(solver: LinearSolver[Any], info: SolverInfo) -> str:
    if solver.most_steps is None:
        return f"did not solve the system to its tolerance. {solver.remedy}"
    if info.steps < solver.most_steps:
        return (
            "stagnated above its tolerance: the Hessian is singular or ill-conditioned, or the dtype is not precise "
            f"enough. {solver.stagnation_remedy}"
        )
    return f"stopped after {counted(info.steps, 'step')} above its tolerance. {solver.remedy}"


def _negative_curvature(damping: float, curvature: Spectrum[float] | None, automatic: bool) -> str:
    smallest, largest = _ends(curvature)
    if curvature is not None and smallest >= -1e-6 * abs(largest):
        return _zero_curvature(damping, largest)
    spectrum, needed = "", damping
    if curvature is not None:
        # The estimate is too close to zero. The present damping was too small.
        spectrum = f" (eigenvalues from about {smallest:.2g} to {largest:.2g})"
        needed = max(-smallest, damping)
    found = "" if automatic else 'use damping="auto", '
    return (
        f"met non-positive curvature. The Hessian is not positive definite{spectrum}: {found}"
        f"{_more_damping(damping, needed)}, train the inner problem further, use "
        'solver="minres", which accepts negative eigenvalues, but no zero ones, or use the Gauss-Newton matrix instead '
        "of the Hessian (bl.Problem.from_model)."
    )


def _zero_curvature(damping: float, largest: float) -> str:
    """Return the message for a spectrum without a negative eigenvalue beyond rounding."""
    if largest > 0:  # a few products do not resolve the smallest eigenvalue
        found = (
            "met non-positive curvature. The Hessian is not positive definite (the largest eigenvalue is about "
            f"{largest:.2g}, the smallest is zero or slightly negative)"
        )
    else:
        found = "met zero curvature. The Hessian is zero, because the inner loss is linear in params"
    needed = max(1e-3 * largest, damping)
    return (
        f"{found}: {_more_damping(damping, needed)}, or leave out of params what has no influence on the gradient of "
        'the inner loss, or give it a penalty. solver="minres" does not help.'
    )


def _more_damping(damping: float, needed: float) -> str:
    verb = "raise" if damping else "add"
    return f"{verb} damping above {needed:.2g}" if needed else f"{verb} damping"


def diverged(damping: float, curvature: Spectrum[float] | None) -> str:
    """Return the remedy for a series that diverges with a symmetric operator."""
    smallest, largest = _ends(curvature)
    if curvature is None:
        return (
            "diverged. Its step_size must stay below 2 over the largest eigenvalue of the Hessian, and no eigenvalue "
            'may be negative: use step_size="auto", add damping, or train the inner problem further.'
        )
    if smallest + damping < -1e-6 * abs(largest):
        return (
            f"diverged. The Hessian has a negative eigenvalue (about {smallest:.2g}), so no step size converges: add "
            f"damping above {-smallest:.2g}, or train the inner problem further."
        )
    top = largest + damping
    return (
        f"diverged. The largest eigenvalue of the Hessian{' with its damping' if damping else ''} is about {top:.3g}: "
        f'use step_size={1 / top:.2g} (it must stay below {2 / top:.2g}), or step_size="auto".'
    )


def _ends(curvature: Spectrum[float] | None) -> tuple[float, float]:
    """Return bounds of the spectrum, or 0 and 0 if it is unknown."""
    if curvature is None:
        return 0.0, 0.0
    smallest, largest, below, above = curvature
    # Estimates lie inside the spectrum: a negative estimate proves a negative eigenvalue, an error bound does not.
    return smallest - below if smallest < 0 else smallest, largest + above
