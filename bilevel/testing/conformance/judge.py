"""What every answer of a linear solver is held to: solved where that was promised, and never a lie."""

import numpy as np
from scipy import linalg

from bilevel.results import Status
from bilevel.testing.conformance.checks import require
from bilevel.testing.conformance.subject import Answer, Subject
from bilevel.testing.conformance.systems import System

ROUNDING = 100  # times eps, what a backward stable computation stays below


def judge(subject: Subject, system: System, answer: Answer, *, promised: bool = False) -> None:
    """Raise an AssertionError unless an answer is honest and, if promised, a solution."""
    honest(subject, system, answer)
    if promised:
        solved(subject, system, answer)


def solved(subject: Subject, system: System, answer: Answer) -> None:
    """Raise an AssertionError unless the status is CONVERGED and v the solution, to the accuracy promised."""
    where, tolerance = _where(subject, system), subject.tolerance()
    matrix, rhs = subject.rounded(system)
    require(answer.info.status == Status.CONVERGED, where, "CONVERGED (a promise of check_solver's solves=)", answer)
    error, allowed = np.linalg.norm(rhs - matrix @ answer.x), tolerance * np.linalg.norm(rhs)
    require(error <= allowed, where, f"norm(b - A v) <= {allowed:.2g}", f"{error:.2g}; {answer}")
    if np.linalg.cond(matrix) < 1e8:
        exact = linalg.solve(matrix, rhs)
        error, allowed = np.linalg.norm(answer.x - exact), tolerance * system.condition * np.linalg.norm(exact)
        require(error <= allowed, where, f"v = {exact} to {allowed:.2g} in norm", f"{error:.2g}; {answer}")


def honest(subject: Subject, system: System, answer: Answer) -> None:
    """Raise an AssertionError if the info or the dtype of an answer to a finite system is not true."""
    where, info = _where(subject, system), answer.info
    matrix, rhs = subject.rounded(system)
    eps = subject.backend.space.eps(subject.array(rhs))
    require(all(dtype == subject.dtype for _, _, dtype in answer.leaves), where, f"v in {subject.dtype}", answer.leaves)
    require(np.isfinite(answer.x).all(), where, "a finite v, since the system is finite", answer)
    require(info.status != Status.NON_FINITE, where, "no NON_FINITE, since the system is finite", answer)
    size = np.linalg.norm(rhs)
    require(abs(info.rhs_norm - size) <= ROUNDING * eps * size, where, f"info.rhs_norm = {size:.6g}", answer)

    left = float(np.linalg.norm(rhs - matrix @ answer.x))
    rounding = ROUNDING * eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(answer.x) + size)
    if subject.truncated:
        # A bound or nan, and only while nothing went wrong: the status tells of all else.
        if info.status == Status.CONVERGED and not np.isnan(info.residual_norm):
            bound = 2 * info.residual_norm + rounding
            require(left <= bound, where, f"info.residual_norm to bound norm(b - A v) = {left:.3g}", answer)
        return
    if info.status == Status.CONVERGED:
        allowed = subject.tolerance() * size
        require(left <= allowed, where, f"norm(b - A v) <= {allowed:.2g}, or no CONVERGED", f"{left:.2g}; {answer}")
    near = abs(info.residual_norm - left) <= 0.1 * left + rounding
    require(near or info.status == Status.DIVERGED, where, f"info.residual_norm = norm(b - A v) = {left:.6g}", answer)


def same(answer: Answer, other: Answer) -> bool:
    """Tell whether two answers are the same to the bit; nan is equal to nan."""
    numbers = [np.array([*answer.info, *answer.x]) for answer in (answer, other)]
    return np.array_equal(*numbers, equal_nan=True)


def relative_error(x: np.ndarray, expected: np.ndarray) -> float:
    """Return norm(x - expected) / norm(expected); the numerator where the denominator is zero."""
    return float(np.linalg.norm(x - expected) / (np.linalg.norm(expected) or 1.0))


def _where(subject: Subject, system: System) -> str:
    return f"{system.what}, by {subject}"
