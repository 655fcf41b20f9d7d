"""Hyperparameter search with SciPy."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from numbers import Integral
from typing import Any, Generic, NamedTuple

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.convergence import OnFailure
from bilevel.errors import SolverError, SolverWarning, suggest
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient, Status
from bilevel.spaces.array import Args, H, P
from bilevel.validation import find_backend

LOOSEST_RTOL = 1e-2  # of the first linear solves; the gradients are accurate enough for a line search
TIGHTENING = 0.85  # the largest factor per evaluation, so that the sum of the errors is finite
TAKES_BOUNDS = {"L-BFGS-B": True, "BFGS": False, "CG": False}


class Evaluation(NamedTuple):
    """The record of one evaluation of F and its hypergradient in `minimize`."""

    value: float
    grad_norm: float  # of the hypergradient, without the components that point out of the bounds
    rtol: float | None  # tolerance of the linear solve; None for a solver without one
    steps: int
    status: Status


def minimize(
    problem: BilevelProblem,
    hparams0: H,
    *,
    fit: Callable[[H, P], P],
    params0: P | None = None,
    inner_args: Args = (),
    outer_args: Args = (),
    solver: SolverSpec = "cg",
    method: str = "L-BFGS-B",
    bounds: scipy.optimize.Bounds | Sequence[object] | None = None,
    maxiter: int = 50,
    callback: Callable[[scipy.optimize.OptimizeResult], object] | None = None,
    options: Mapping[str, object] | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> scipy.optimize.OptimizeResult:
    """Minimize F(w*(λ), λ) over λ with `scipy.optimize.minimize`.

    At each λ, ``fit`` and the linear solve start from the solution and the adjoint at the last accepted λ. So all
    trials of a line search have the same start. The tolerance of a solver with an ``rtol`` decreases from 1e-2 to its
    ``rtol``. It follows the norm of the hypergradient, and decreases by at least 15 % per evaluation. The errors of the
    gradients are summable, as in HOAG (Pedregosa, ICML 2016). F is divided by the norm of the first hypergradient. So
    the first step has a length of about 1, and the method's ``gtol`` is relative.

    Args:
        problem, inner_args, outer_args, solver, backend: as in `hypergradient`.
        hparams0: the start: a tree of arrays of any backend, scaled so that a change by 1 is moderate.
        fit: ``fit(hparams, params0) -> params`` solves the inner problem from ``params0``, such as `bl.scipy_fit`. Its
            error is noise in the search, which stops if the noise exceeds the steps. ``fit`` may change ``params0`` and
            a model in place, because params are copied.
        params0: the start of the first fit, if it needs a start.
        method: a method of `scipy.optimize.minimize`: L-BFGS-B or, without bounds, CG or BFGS (which stores a matrix).
        bounds: a pair (low, high) for all entries of λ, a SciPy ``Bounds``, or a pair per entry.
        maxiter: maximum number of iterations of the method, at least 1.
        callback: called after each iteration with an ``OptimizeResult`` (``x``, ``params``, ``fun``, ``jac``, ``nit``,
            ``nfev``). Raise ``StopIteration`` in it to stop the search.
        options: further options of the method.
        on_failure: as in `hypergradient`, but "warn" only warns about the first failure. ``history`` has all failures.
        progress: show a bar (tqdm, if installed). None: only if stderr is a terminal.

    Returns:
        An ``OptimizeResult``: ``x`` (the hyperparameters, with the structure of ``hparams0``), ``params``, ``fun``,
        ``jac``, ``nit``, ``nfev``, ``success``, ``status``, ``message``, and ``history``, an `Evaluation` for each
        hypergradient.

    Raises:
        TypeError, ValueError, SolverError: as in `hypergradient`.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> bl.minimize(problem, np.zeros(2), fit=lambda hparams, _: hparams / 2).x.round(3)
    array([2., 2.])
    """
    method = _check_method(method, bounds)
    if isinstance(maxiter, bool) or not isinstance(maxiter, Integral) or maxiter < 1:
        raise ValueError(f"maxiter: expected an integer >= 1, got {maxiter!r}.")
    backend = find_backend(backend, hparams0, hparams0)
    x0 = backend.to_flat(hparams0)
    box = _box(bounds, x0.size)
    call = {"inner_args": inner_args, "outer_args": outer_args, "backend": backend, "on_failure": on_failure}
    search = _Search(problem, fit, params0, as_method(get_solver(solver)), backend, hparams0, box, call)
    nit = 0

    def after_iteration(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal nit
        nit += 1
        here = search.accept(intermediate_result.x)
        advance(here["fun"])
        if callback is not None:
            callback(scipy.optimize.OptimizeResult(nit=nit, **here))

    with _progress_bar(maxiter, progress) as advance:
        found = scipy.optimize.minimize(
            search,
            x0,
            jac=True,
            method=method,
            bounds=None if bounds is None else box,
            callback=after_iteration,
            options={"maxiter": maxiter, **(options or {})},
        )
    # If the bounds fix all entries, SciPy returns no nit and status.
    ended = {key: found.get(key, 0) for key in ("nit", "success", "status", "message")}
    return scipy.optimize.OptimizeResult(**search.accept(found.x), **ended, history=search.history)


class _Point(NamedTuple, Generic[P, H]):
    x: np.ndarray
    hparams: H
    hg: Hypergradient[P, H]
    value: float
    grad: np.ndarray


@dataclasses.dataclass
class _Search(Generic[P, H]):
    """F and its hypergradient as a function for SciPy, with the points of the search."""

    problem: BilevelProblem
    fit: Callable[[H, P], P]
    params0: P | None
    method: Method
    backend: Backend
    hparams0: H
    box: scipy.optimize.Bounds
    call: dict[str, Any]  # further arguments of each hypergradient
    history: list[Evaluation] = dataclasses.field(default_factory=list)
    accepted: _Point[P, H] | None = None
    last: _Point[P, H] | None = None

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return F and its hypergradient, over the norm of the first one."""
        self.last = self.evaluate(x)
        self.accepted = self.accepted or self.last
        scale = self.history[0].grad_norm or 1.0
        return self.last.value / scale, self.last.grad / scale

    def accept(self, x: np.ndarray) -> dict[str, Any]:
        """Make x the source of warm starts, and return the results at x."""
        known = (point for point in (self.last, self.accepted) if point and np.array_equal(point.x, x))
        self.accepted = here = next(known, None) or self.evaluate(x)
        results = {"x": here.hparams, "params": here.hg.params, "fun": here.value, "jac": here.hg.grad}
        return {**results, "nfev": len(self.history)}

    def evaluate(self, x: np.ndarray) -> _Point[P, H]:
        backend, warm = self.backend, self.accepted
        x = x.copy()  # SciPy may overwrite its x, and torch would share the memory
        hparams = backend.space(self.hparams0).unravel(backend.from_numpy(x))
        method, rtol = self._tightened()
        start: Any = self.copied(warm.hg.params) if warm else self.params0
        params = self.fit(hparams, start)
        if params is None:
            raise ValueError("fit: expected the new params, got None. Does the function return them?")
        try:
            with warnings.catch_warnings():
                if any(self.method.failed(evaluation.status) for evaluation in self.history):
                    warnings.simplefilter("ignore", SolverWarning)  # only the first failure warns
                adjoint0 = warm.hg.adjoint if warm else None
                hg = hypergradient(self.problem, params, hparams, solver=method, adjoint0=adjoint0, **self.call)
        except SolverError as error:
            raise SolverError(
                f"{error} This was evaluation {len(self.history) + 1} of minimize, at hyperparameters from "
                f"{x.min():.3g} to {x.max():.3g}. If the inner problem cannot be solved there, pass bounds=(low, high)."
            ) from error
        value, grad = float(backend.to_host(hg.value)), backend.to_flat(hg.grad)
        blocked = ((x <= self.box.lb) & (grad > 0)) | ((x >= self.box.ub) & (grad < 0))
        grad_norm = float(np.linalg.norm(np.where(blocked, 0.0, grad)))
        self.history.append(Evaluation(value, grad_norm, rtol, hg.info.steps, hg.info.status))
        return _Point(x, hparams, hg._replace(params=self.copied(hg.params)), value, grad)

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


def _check_method(method: str, bounds: object) -> str:
    known = {name.lower(): name for name in TAKES_BOUNDS}
    if str(method).lower() not in known:
        raise ValueError(f"method: minimize does not support {method!r}." + suggest(str(method), TAKES_BOUNDS))
    method = known[method.lower()]
    if bounds is not None and not TAKES_BOUNDS[method]:
        raise ValueError(f'bounds: {method} does not accept bounds; use method="L-BFGS-B".')
    return method


def _box(bounds: Any, size: int) -> scipy.optimize.Bounds:
    if bounds is None:
        bounds = (-np.inf, np.inf)
    try:
        if isinstance(bounds, scipy.optimize.Bounds):
            low, high = bounds.lb, bounds.ub
        elif len(bounds) == 2 and np.ndim(bounds[0]) == 0:
            low, high = bounds
        else:
            low, high = zip(*bounds, strict=True)
        limits: Any = [np.broadcast_to(np.asarray(bound, float), size) for bound in (low, high)]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"bounds: expected (low, high), scipy.optimize.Bounds or a pair for each of {size} entries, got {bounds!r}."
        ) from error
    return scipy.optimize.Bounds(*limits)


@contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances a bar and shows the value. Without a bar, the function does nothing."""
    bar = None
    if sys.stderr.isatty() if show is None else show:
        with suppress(ImportError):
            from tqdm.auto import tqdm

            bar = tqdm(total=total, desc="minimize", unit="iteration")
    with bar or nullcontext():

        def advance(value: float) -> None:
            if bar is not None:
                bar.set_postfix(value=f"{value:.5g}", refresh=False)
                bar.update()

        yield advance
