"""What a hypergradient call returns. NamedTuples, so that they are pytrees in every framework."""

from enum import IntEnum
from typing import Any, NamedTuple


class Status(IntEnum):
    """How a solve ended.

    ``CONVERGED`` means that the method did what it promised: the tolerance was met by a residual
    computed from the operator itself, or, for a method with a fixed number of terms (``identity``,
    ``neumann``, ``unrolled``), all of them were summed and nothing went wrong.
    """

    CONVERGED = 0
    MAXITER = 1
    NEGATIVE_CURVATURE = 2
    DIVERGED = 3
    NON_FINITE = 4


class SolverInfo(NamedTuple):
    """How the adjoint was found: Python numbers from an eager call, arrays under ``jit`` and ``vmap``.

    Attributes:
        steps: iterations; one Hessian-vector product each, two of BiCGStab.
        residual_norm: norm of rhs - A v, in the units of ``rhs_norm``; each solver says how it knows it.
            ``nan`` where measuring it would cost as much as the solve (``identity``).
        rhs_norm: norm of the right-hand side dF/dw.
        status: a `Status`.
    """

    steps: Any
    residual_norm: Any
    rhs_norm: Any
    status: Any


class Hypergradient(NamedTuple):
    """dF/dλ at one point and how it came about.

    Attributes:
        grad: dF/dλ, with the structure, shapes and dtypes of ``hparams``.
        value: F(w, λ), a scalar of the framework.
        adjoint: v of (∂²L/∂w²) v = ∂F/∂w, with the structure of ``params``; the warm start
            (``adjoint0``) of a next call nearby.
        params: where the hypergradient was taken: the ``params`` given, or the end of an unroll.
        info: `SolverInfo`.
    """

    grad: Any
    value: Any
    adjoint: Any
    params: Any
    info: SolverInfo
