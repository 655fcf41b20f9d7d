"""Checks of each answer of a linear solver: its status and its residual are true, and promised systems are solved."""

import numpy as np
from scipy import linalg

from bilevel.linear_solvers.auto_damping import SLACK
from bilevel.results import Status
from bilevel.testing.conformance.checks import require
from bilevel.testing.conformance.subject import Answer, Subject
from bilevel.testing.conformance.systems import System

ROUNDING = 100  # times eps: a bound of the error of a backward stable computation
PRODUCT = 5  # times eps norm(A) norm(v): a bound of the rounding error of a residual


def judge(s: Subject, system: System, answer: Answer, *, promised: bool = False) -> None:
    """Raise an AssertionError unless the info of an answer is true and, if promised, the answer is a solution."""
    honest(s, system, answer)
    if promised:
        solved(s, system, answer)


def solved(s: Subject, system: System, answer: Answer) -> None:
    """Raise an AssertionError unless the status is CONVERGED and v is the solution to the promised accuracy."""
    tolerance = s.tolerance()
    matrix, rhs = s.rounded(system)
    expect(answer.info.status == Status.CONVERGED, s, system, "CONVERGED (a promise of check_solver's solves=)", answer)
    error, allowed = np.linalg.norm(rhs - matrix @ answer.x), tolerance * np.linalg.norm(rhs)
    expect(error <= allowed, s, system, f"norm(b - A v) <= {allowed:.2g}", f"{error:.2g}; {answer}")
    if np.linalg.cond(matrix) < 1e8:
        exact = linalg.solve(matrix, rhs)
        error, allowed = np.linalg.norm(answer.x - exact), tolerance * system.condition * np.linalg.norm(exact)
        expect(error <= allowed, s, system, f"v = {exact} to {allowed:.2g} in norm", f"{error:.2g}; {answer}")


def honest(s: Subject, system: System, answer: Answer) -> None:
    """Raise an AssertionError if the info or the dtype of an answer to a finite system is not true."""
    info = answer.info
    matrix, rhs = s.rounded(system)
    eps = s.eps
    slack = 0.0
    if s.automatic:  # the answer is to the system with the damping that it tells, or a nearby one
        matrix = matrix + info.damping * np.eye(rhs.size)
        slack = SLACK * info.damping * float(np.linalg.norm(answer.x))
    expect(all(dtype == s.dtype for _, _, dtype in answer.leaves), s, system, f"v in {s.dtype}", answer.leaves)
    expect(np.isfinite(answer.x).all(), s, system, "a finite v, since the system is finite", answer)
    expect(info.status != Status.NON_FINITE, s, system, "no NON_FINITE, since the system is finite", answer)
    size = np.linalg.norm(rhs)
    expect(abs(info.rhs_norm - size) <= ROUNDING * eps * size, s, system, f"info.rhs_norm = {size:.6g}", answer)

    left = float(np.linalg.norm(rhs - matrix @ answer.x))
    rounding = PRODUCT * eps * (np.linalg.norm(matrix, 2) * np.linalg.norm(answer.x) + size)
    if s.truncated:
        # With CONVERGED, the residual norm is a bound or nan. With another status, it need not be a bound.
        if info.status == Status.CONVERGED and not np.isnan(info.residual_norm):
            # Each added term rounds the sum. Errors of both signs grow with the root of their number.
            bound = 2 * info.residual_norm + rounding * max(info.steps, 1) ** 0.5
            expect(left <= bound, s, system, f"info.residual_norm to bound norm(b - A v) = {left:.3g}", answer)
        return
    if info.status == Status.CONVERGED:
        allowed = max(s.tolerance() * size, 1.01 * slack)
        expect(left <= allowed, s, system, f"norm(b - A v) <= {allowed:.2g}, or no CONVERGED", f"{left:.2g}; {answer}")
    near = abs(info.residual_norm - left) <= 0.1 * left + rounding
    expect(
        near or info.status == Status.DIVERGED, s, system, f"info.residual_norm = norm(b - A v) = {left:.6g}", answer
    )


def expect(holds: object, s: Subject, system: System, expected: str, got: object) -> None:
    """Raise an AssertionError that names the system and the solver, unless ``holds`` is true."""
    require(holds, f"{system.what}, by {s}", expected, got)


def same(answer: Answer, other: Answer) -> bool:
    """Return whether two answers are equal to the bit. nan equals nan."""
    numbers = [np.array([*answer.info, *answer.x]) for answer in (answer, other)]
    return np.array_equal(*numbers, equal_nan=True)


def relative_error(x: np.ndarray, expected: np.ndarray) -> float:
    """Return norm(x - expected) / norm(expected), or norm(x) if expected is zero."""
    return float(np.linalg.norm(x - expected) / (np.linalg.norm(expected) or 1.0))
