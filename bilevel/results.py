"""Results of hypergradients. They are NamedTuples, so they are pytrees in every framework."""

from enum import IntEnum
from typing import Any, Generic, NamedTuple

from bilevel.spaces.array import H, P


class Status(IntEnum):
    """The outcome of a solve. Its text is its name. Under ``jit``, a status is an array of its number.

    >>> print(Status.MAXITER, Status(1) == 1)
    MAXITER True

    Attributes:
        CONVERGED: a residual from a product with the operator meets the tolerance. For a method with a fixed number of
            terms (``identity``, ``neumann``, ``unrolled``), all terms are summed without a failure.
        MAXITER: the residual is above the tolerance after the last allowed step, or cannot become smaller.
        NEGATIVE_CURVATURE: the solver needs a positive definite operator, and has found a direction without positive
            curvature.
        DIVERGED: the terms of a series or the steps of an unroll have grown.
        NON_FINITE: a number is nan or infinite.
    """

    CONVERGED = 0
    MAXITER = 1
    NEGATIVE_CURVATURE = 2
    DIVERGED = 3
    NON_FINITE = 4

    def __str__(self) -> str:
        return self.name


class SolverInfo(NamedTuple):
    """Information about a solve: Python numbers from an eager call, arrays under ``jit`` and ``vmap``.

    Attributes:
        steps: number of iterations, of one Hessian-vector product each, or two for BiCGStab.
        residual_norm: norm of rhs - A v, in the units of ``rhs_norm``. Each solver documents its computation. ``nan``
            if it would take as much work as the solve (``identity``).
        rhs_norm: norm of the right-hand side ∂F/∂w.
        status: a `Status`.
        inner_grad_norm: norm of ∂L/∂w at ``params``, or of the residual of a fixed point or root. It is zero at a
            solution of the inner problem, and ``nan`` if it is unknown (``unrolled``, `hypergradient_from`).
        value_error: estimate of F(params) − F(w*), to first order: vᵀ ∂L/∂w, or v times the residual of a fixed point
            or root. It is zero at a solution of the inner problem, and ``nan`` if it is unknown: with a list of
            batches, because ∂L/∂w is of the first batch, and outside ``jit`` also if ``residual_norm`` is ``nan``.
        damping: δ of the solved system (H + δ I) v = ∂F/∂w: the option of the solver, or what "auto" found.
        kinks: number of entries of params at a kink of the proximal step or of an inequality, to rounding. w*(λ) has no
            derivative there. It is zero for a `bl.Problem`, a `bl.FixedPoint` and a `bl.Root`, which do not count them.
    """

    steps: Any
    residual_norm: Any
    rhs_norm: Any
    status: Any
    inner_grad_norm: Any = float("nan")
    value_error: Any = float("nan")
    damping: Any = 0.0
    kinks: Any = 0.0

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return Python numbers by name, for loggers such as TensorBoard or wandb. Call it outside ``jit``.

        >>> SolverInfo(3, 0.5, 2.0, Status.MAXITER, 0.1).as_dict("inner/")["inner/residual_norm"]
        0.5
        """
        numbers = self._asdict() | {"converged": self.status == Status.CONVERGED}
        counts = ("steps", "status", "converged")
        return {prefix + name: int(x) if name in counts else float(x) for name, x in numbers.items()}


class Hypergradient(NamedTuple, Generic[P, H]):
    """dF/dλ at one point, with information about the solve.

    Attributes:
        grad: dF/dλ, with the structure, shapes and dtypes of ``hparams``.
        value: F(w, λ), a scalar of the framework.
        adjoint: v of (∂²L/∂w²) v = ∂F/∂w, with the structure of ``params``. It is a warm start (``adjoint0``) of the
            next call.
        params: the weights of the hypergradient: the given ``params``, or the end of an unroll.
        info: `SolverInfo`.
    """

    grad: H
    value: Any
    adjoint: P
    params: P
    info: SolverInfo
