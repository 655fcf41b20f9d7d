"""What a hypergradient call returns. NamedTuples, so that they are pytrees in every framework."""

from enum import IntEnum
from typing import Any, Generic, NamedTuple

from bilevel.spaces.array import H, P


class Status(IntEnum):
    """How a solve ended.

    ``CONVERGED`` means that the method did what it promises. Either the tolerance was met by a residual computed from
    the operator itself. Or, for a method with a fixed number of terms (``identity``, ``neumann``, ``unrolled``), all of
    them were summed and nothing went wrong.
    """

    CONVERGED = 0
    MAXITER = 1
    NEGATIVE_CURVATURE = 2
    DIVERGED = 3
    NON_FINITE = 4


class SolverInfo(NamedTuple):
    """How the adjoint was found: Python numbers from an eager call, arrays under ``jit`` and ``vmap``.

    Attributes:
        steps: iterations; one Hessian-vector product each, two for BiCGStab.
        residual_norm: norm of rhs - A v, in the units of ``rhs_norm``. Each solver documents how it is known. ``nan``
            where it would cost as much as the solve (``identity``).
        rhs_norm: norm of the right-hand side ∂F/∂w.
        status: a `Status`.
        inner_grad_norm: norm of ∂L/∂w at ``params``, or of the residual of a fixed point or root: zero where the inner
            problem is solved. ``nan`` where it is not known (``unrolled``, `hypergradient_from`).
    """

    steps: Any
    residual_norm: Any
    rhs_norm: Any
    status: Any
    inner_grad_norm: Any = float("nan")

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return Python numbers by name, for loggers such as TensorBoard or wandb. Call it outside ``jit``.

        >>> SolverInfo(3, 0.5, 2.0, Status.MAXITER, 0.1).as_dict("inner/")["inner/residual_norm"]
        0.5
        """
        numbers = self._asdict() | {"converged": self.status == Status.CONVERGED}
        counts = ("steps", "status", "converged")
        return {prefix + name: int(x) if name in counts else float(x) for name, x in numbers.items()}


class Hypergradient(NamedTuple, Generic[P, H]):
    """dF/dλ at one point and how it was found.

    Attributes:
        grad: dF/dλ, with the structure, shapes and dtypes of ``hparams``.
        value: F(w, λ), a scalar of the framework.
        adjoint: v of (∂²L/∂w²) v = ∂F/∂w, with the structure of ``params``; the warm start (``adjoint0``) of a next
            call nearby.
        params: where the hypergradient was taken: the ``params`` given, or the end of an unroll.
        info: `SolverInfo`.
    """

    grad: H
    value: Any
    adjoint: P
    params: P
    info: SolverInfo
