"""The base class of linear solvers and methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self

from bilevel.operators.lanczos import Spectrum
from bilevel.options import summary
from bilevel.results import SolverInfo, Status


class Solver:
    """A solver that a user can choose: a linear solver or a method. Its options are the fields of a frozen dataclass.

    Attributes:
        stateful: whether the object changes with each call. JAX cannot compile such a solver.
        damping: added to the diagonal of the operator. "auto": found by each solve, which reports it.
        rtol: largest relative residual with the status ``CONVERGED``; 0: no bound. None: the maximum number of steps is
            a budget, and a solve that uses it up has not failed.
    """

    stateful: ClassVar[bool] = False
    damping: float | Literal["auto"] = 0.0
    rtol: float | None = 0.0

    @property
    def name(self) -> str:
        """The name in messages."""
        return type(self).__name__

    @property
    def summary(self) -> str:
        """The solver with only the options that differ from their defaults."""
        return summary(self)

    @property
    def fixed_damping(self) -> float:
        """The damping inside of a solve, where it is a number. It may be an array of the framework."""
        return self.damping  # pyright: ignore[reportReturnType]

    def with_rtol(self, rtol: float) -> Self:
        """Return the solver with another relative tolerance. A solver without a tolerance returns itself."""
        return self

    def failed(self, status: Any) -> Any:
        """Return whether a `Status` is a failure of this solver. The status may be an array of the framework."""
        return status > int(Status.CONVERGED if self.rtol is not None else Status.MAXITER)

    @abstractmethod
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        """Return the cause of a failed solve, and a remedy.

        ``info`` and ``curvature``, the spectrum of the undamped operator, are in Python numbers. ``curvature`` is None
        if it is unknown.
        """
        raise NotImplementedError

    def record(self, info: SolverInfo) -> None:
        """Record the information about a solve, in Python numbers."""
