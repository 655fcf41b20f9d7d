"""A direct solver with the dense Hessian, for small problems."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from typing_extensions import override

from bilevel.linear_solvers.linear_solver import STEADY, LinearSolver
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import scale_free
from bilevel.options import check_real
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import V

MAX_SIZE = 5_000


def check_size(size: int, what: str = "the exact solver") -> None:
    """Raise a ValueError if a dense Hessian of this size is too large."""
    if size > MAX_SIZE:
        raise ValueError(
            f"params has {size:,} entries: {what} would take {size:,} Hessian-vector products and "
            f"{8 * size**2 / 2**30:,.1f} GiB for the dense Hessian (limit: {MAX_SIZE:,} entries). "
            'Use solver="cg" or solver="neumann", which need only products.'
        )


def solve_dense(matrix: np.ndarray, rhs: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """Solve a dense system by LAPACK. For a singular system, return the least-squares solution of least norm.

    ``eps`` is the precision of the entries. A matrix that is singular to this precision counts as singular.
    """
    from scipy import linalg

    if not (np.isfinite(matrix).all() and np.isfinite(rhs).all()):
        return np.full_like(rhs, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", linalg.LinAlgWarning)
        try:
            x = linalg.solve(matrix, rhs)
            if len(rhs) * eps * np.linalg.norm(matrix) * np.linalg.norm(x) <= np.linalg.norm(rhs):
                return x
        except (linalg.LinAlgError, linalg.LinAlgWarning):
            pass
        return np.asarray(linalg.lstsq(matrix, rhs, cond=len(rhs) * eps)[0])  # pyright: ignore[reportOptionalSubscript]


@dataclass(frozen=True)
class Exact(LinearSolver[None]):
    """Solve (H + damping I) v = b with the dense Hessian, by n products and LAPACK's LU in float64.

    With any backend, the Hessian is copied to the host as a NumPy array; under ``jit``, by a callback. It may be
    indefinite. If it is singular, v is the solution of least norm. Without a solution, the status is ``MAXITER``.

    Args:
        damping: added to the Hessian.

    Raises:
        ValueError: for more than 5,000 weights, with the memory that they would need.
    """

    requires: ClassVar[frozenset[str]] = frozenset({STEADY})
    remedy: ClassVar[str] = "There is no solution: the Hessian is singular to the precision of the dtype. Add damping."

    damping: float = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        check_real(self, "damping", least=0)

    @override
    def solve(self, state: None, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        check_size(A.space.size)
        A = A.damped(self.damping)
        return scale_free(lambda b, x0, scale: self._solve(A, b), b, None, A.space)

    def _solve(self, A: LinearOperator[V], rhs: V) -> tuple[V, SolverInfo]:
        space, xp, size = A.space, A.space.xp, A.space.size
        solve = partial(solve_dense, eps=space.eps)
        x = space.unravel(space.numpy_callback(solve, space.materialise(A), space.ravel(rhs)))
        rhs_norm, left = space.norm(rhs), space.norm(A.residual(rhs, x))
        steps = xp.full_like(rhs_norm, size, dtype=xp.int32)
        met = left <= space.eps**0.5 * rhs_norm
        status = xp.where(met, int(Status.CONVERGED), xp.full_like(steps, int(Status.MAXITER)))
        status = xp.where(xp.isfinite(left), status, int(Status.NON_FINITE))
        return x, SolverInfo(steps, left, rhs_norm, status)
