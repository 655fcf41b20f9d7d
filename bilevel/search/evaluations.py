"""F and its hypergradient as a function for SciPy. A search starts each solve warm, and can be resumed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.errors import DependenceWarning, InnerProblemWarning, SolverError, SolverWarning
from bilevel.hypergradient import hypergradient
from bilevel.methods.method import Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Status
from bilevel.spaces.array import H, P
from bilevel.trainings import check_fit_result
from bilevel.validation import check_like

LOOSEST_RTOL = 1e-2  # of the first linear solves; the gradients are accurate enough for a line search
TIGHTENING = 0.85  # the largest factor per evaluation, so that the sum of the errors is finite
SOLVED = 1e-4  # of F or of its decrease: the largest error by an unsolved inner problem in a search that succeeds
FORMAT = 1  # of the state
EPS = np.finfo(np.float64).eps


class Evaluation(NamedTuple):
    """The record of one evaluation of F and its hypergradient in `minimize`.

    Attributes:
        value: F.
        grad_norm: norm of the hypergradient, without the components that point out of the bounds.
        rtol: tolerance of the linear solve. None: the solver has none.
        steps: iterations of the linear solve.
        status: a `Status`.
        inner_grad_norm: as in `SolverInfo`; nan if it is unknown.
        value_error: as in `SolverInfo`; nan if it is unknown.
    """

    value: float
    grad_norm: float
    rtol: float | None
    steps: int
    status: Status
    inner_grad_norm: float
    value_error: float


class Point(NamedTuple, Generic[P]):
    """A point where F was evaluated.

    A repeated evaluation has no ``params`` and ``adjoint``, except at the point where the recorded search ended.
    """

    x: np.ndarray
    value: float
    grad: np.ndarray
    params: P | None
    adjoint: P | None


@dataclasses.dataclass
class Search(Generic[P, H]):
    """F and its hypergradient as a function for SciPy.

    Attributes:
        box: the bounds of the hyperparameters.
        call: further arguments of each hypergradient.
        history: the record of each evaluation.
        points: x, F and the hypergradient of each evaluation.
        recorded: the state of an earlier search. Its evaluations are repeated first, without a call of ``fit``.
        last: the last evaluation.
        here: the point that was accepted last, the source of warm starts.
    """

    problem: BilevelProblem
    fit: Callable[[H, P], P]
    params0: P | None
    method: Method
    backend: Backend
    hparams0: H
    box: scipy.optimize.Bounds
    call: dict[str, Any]
    history: list[Evaluation] = dataclasses.field(default_factory=list)
    points: list[tuple[np.ndarray, float, np.ndarray]] = dataclasses.field(default_factory=list)
    recorded: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.here: Any = None
        self.last: Any = None

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return F and its hypergradient, both divided by the norm of the first hypergradient.

        If the first hypergradient is zero to rounding, the start is a minimum, and the search must end there.
        """
        self.last = self.evaluate(x)
        self.here = self.here or self.last
        first = self.history[0]
        scale = first.grad_norm if first.grad_norm > EPS * abs(first.value) else 1.0
        return self.last.value / scale, self.last.grad / scale

    def accept(self, x: np.ndarray) -> None:
        """Make x the source of warm starts."""
        known = (point for point in (self.last, self.here) if point and np.array_equal(point.x, x))
        self.here = next(known, None) or self.evaluate(x)

    def results(self) -> dict[str, Any]:
        """Return the results at the accepted point, and the state."""
        here = self.here
        found = {"x": self.hparams(here.x), "params": here.params, "fun": here.value, "jac": self.hparams(here.grad)}
        return {**found, "nfev": len(self.history), "state": self.state()}

    def state(self) -> dict[str, Any]:
        """Return the state that `load` accepts."""
        return {
            "format": FORMAT,
            "points": [list(point) for point in self.points],
            "history": [[*each._replace(status=int(each.status))] for each in self.history],
            "x": self.here.x,
            "params": self.here.params,
            "adjoint": self.here.adjoint,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Make the search repeat the evaluations of a state first.

        Raises:
            ValueError: if it is no state of a search.
            TypeError: if its arrays have become lists.
        """
        expected = ["adjoint", "format", "history", "params", "points", "x"]
        if not isinstance(state, Mapping) or sorted(state) != expected or state["format"] != FORMAT:
            raise ValueError("resume: expected the state of a result of bl.minimize (result.state), of this version.")
        if not all(isinstance(array, np.ndarray) for point in state["points"] for array in point[::2]):
            raise TypeError("resume: expected arrays in the state. JSON makes lists of them: save it by pickle.")
        self.recorded = state

    @property
    def repeated(self) -> bool:
        """Whether all evaluations so far were repeated from a state."""
        return self.recorded is not None and len(self.history) <= len(self.recorded["points"])

    def evaluate(self, x: np.ndarray) -> Point[P]:
        """Return F and its hypergradient at x, and record them."""
        x = x.copy()  # SciPy may overwrite its x, and torch would share the memory
        repeats = self.recorded is not None and len(self.history) < len(self.recorded["points"])
        point, evaluation = self._repeat(x) if repeats else self._compute(x)
        self.points.append((x, point.value, point.grad))
        self.history.append(evaluation)
        return point

    def _repeat(self, x: np.ndarray) -> tuple[Point[P], Evaluation]:
        state: Any = self.recorded
        at, value, grad = state["points"][len(self.history)]
        if not np.array_equal(at, x):
            raise ValueError(
                "resume: the state is of another search. Pass the same problem, hparams0, method, bounds and options "
                "as before the interruption."
            )
        evaluation = Evaluation(*state["history"][len(self.history)])
        evaluation = evaluation._replace(status=Status(evaluation.status))
        end = (state["params"], state["adjoint"]) if np.array_equal(x, state["x"]) else (None, None)
        return Point(x, value, grad, *end), evaluation

    def _compute(self, x: np.ndarray) -> tuple[Point[P], Evaluation]:
        backend, warm = self.backend, self.here
        method, rtol = self._tightened()
        start: Any = self.copied(warm.params) if warm else self.params0
        params = check_fit_result(backend, self.fit(self.hparams(x), start))
        if warm:
            check_like(backend, "the result of fit", params, "its result before", warm.params)
        hparams = self.hparams(x)  # again, because a fit may change its arguments
        try:
            with warnings.catch_warnings():
                if any(self.method.failed(evaluation.status) for evaluation in self.history):
                    warnings.simplefilter("ignore", SolverWarning)  # only the first failure warns
                if self.history:
                    warnings.simplefilter("ignore", DependenceWarning)
                    warnings.simplefilter("ignore", InnerProblemWarning)
                adjoint0 = warm.adjoint if warm else None
                hg = hypergradient(self.problem, params, hparams, solver=method, adjoint0=adjoint0, **self.call)
        except SolverError as error:
            raise SolverError(
                f"{error} This was evaluation {len(self.history) + 1} of minimize, at hyperparameters from "
                f"{x.min():.3g} to {x.max():.3g}. If the inner problem cannot be solved there, pass bounds=(low, high)."
            ) from error
        value, grad, info = float(backend.to_host(hg.value)), backend.to_flat(hg.grad), hg.info
        blocked = ((x <= self.box.lb) & (grad > 0)) | ((x >= self.box.ub) & (grad < 0))
        grad_norm = float(np.linalg.norm(np.where(blocked, 0.0, grad)))
        evaluation = Evaluation(value, grad_norm, rtol, info.steps, info.status, info.inner_grad_norm, info.value_error)
        return Point(x, value, grad, self.copied(hg.params), hg.adjoint), evaluation

    def unsolved(self) -> str | None:
        """Return a message if the inner problem is not solved at the accepted point."""
        values = [evaluation.value for evaluation in self.history]
        at = max(i for i, (x, *_) in enumerate(self.points) if np.array_equal(x, self.here.x))
        errors = [abs(evaluation.value_error) for evaluation in self.history]
        # With a noisy fit, one error may be small by chance.
        error = max(errors[at], float(np.median(errors[-5:])))
        # A fit in float32 cannot be more accurate: rounding leaves an error of w of about √eps.
        share = max(SOLVED, 10 * self.backend.space(self.here.params).eps ** 0.5)
        if not error > share * max(abs(self.here.value), max(values) - self.here.value):
            return None
        return (
            f"fit does not solve the inner problem: to first order, the outer objective {self.here.value:.6g} differs "
            f"by {error:.2g} at its solution. Make fit more accurate, and check that it uses its hyperparameters and "
            "minimizes the inner objective of the problem. If a bound or a kink such as |w| holds the params, use "
            "bl.Projected or bl.Proximal."
        )

    def hparams(self, x: np.ndarray) -> H:
        """Return a tree like the hyperparameters, which shares no memory with the entries."""
        return self.backend.space(self.hparams0).unravel(self.backend.from_numpy(x.copy()))

    def copied(self, params: P) -> P:
        """Return a copy of params without a graph, because a fit may train in place."""
        return self.backend.run(_copy, params)

    def _tightened(self) -> tuple[Method, float | None]:
        """Return the method with a tolerance that follows the progress of the search, and the tolerance."""
        if not self.method.rtol or self.method.stateful:
            return self.method, None
        norms = [evaluation.grad_norm for evaluation in self.history] or [1.0]
        progress = min(min(norms) / (norms[0] or 1.0), TIGHTENING ** len(self.history))
        rtol = max(float(self.method.rtol), LOOSEST_RTOL * progress)
        return self.method.with_rtol(rtol), rtol


def _copy(backend: Backend, params: P) -> P:
    return backend.space(params).copy(params)
