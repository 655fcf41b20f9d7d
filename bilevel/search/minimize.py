"""Hyperparameter search for those who have no loop of their own, in SciPy's style."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from numbers import Integral
from typing import Any, Generic, NamedTuple

import numpy as np
from scipy import optimize

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.convergence import OnFailure
from bilevel.errors import SolverError, SolverWarning, suggest
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient, Status
from bilevel.spaces.array import H, P
from bilevel.validation import find_backend

LOOSEST_RTOL = 1e-2  # of the first linear solves: a line search still finds its way by such gradients
TIGHTENING = 0.85  # per evaluation at least, so that errors add up to something finite
TAKES_BOUNDS = {"L-BFGS-B": True, "BFGS": False, "CG": False}


class Evaluation(NamedTuple):
    """One evaluation of F and its hypergradient, as `minimize` records it."""

    value: float
    grad_norm: float  # of the hypergradient, less what pushes against the bounds
    rtol: float | None  # asked of the linear solve; None for a solver without one
    steps: int
    status: Status


def minimize(
    problem: BilevelProblem,
    hparams0: H,
    *,
    fit: Callable[[H, P], P],
    params0: P | None = None,
    inner_args: tuple[object, ...] = (),
    outer_args: tuple[object, ...] = (),
    solver: SolverSpec = "cg",
    method: str = "L-BFGS-B",
    bounds: optimize.Bounds | Sequence[object] | None = None,
    maxiter: int = 50,
    callback: Callable[[optimize.OptimizeResult], object] | None = None,
    options: Mapping[str, object] | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> optimize.OptimizeResult:
    """Minimize F(w*(λ), λ) over λ with `scipy.optimize.minimize`.

    At each λ, ``fit`` and the linear solve start from the solution and the adjoint at the last accepted λ, so that
    all trials of a line search start alike. The tolerance of a solver with an ``rtol`` falls from 1e-2 to the solver's
    own, with the norm of the hypergradient and at least by 15 % per evaluation (approximate gradients with summable
    errors, as in HOAG: Pedregosa, ICML 2016).
    SciPy is shown F over the norm of the first hypergradient: a first step is of length about 1, and the method's
    ``gtol`` is relative.

    Args:
        problem: as in `hypergradient`.
        hparams0: where to start: a tree of arrays of any backend, scaled so that a change by 1 is moderate.
        fit: ``fit(hparams, params0) -> params`` solves the inner problem from ``params0``; `bl.scipy_fit` makes one.
            What it leaves unsolved is noise to the search, which ends where steps drown in it. It may train in place,
            both ``params0`` and a model: params are copied.
        params0: what the first fit starts from, if it needs that.
        inner_args: further arguments of L.
        outer_args: further arguments of F.
        solver: as in `hypergradient`.
        method: of `scipy.optimize.minimize`: L-BFGS-B; or, without bounds, CG or BFGS (which keeps a matrix).
        bounds: a pair (low, high) for all entries of λ, or SciPy's: a ``Bounds``, or a pair per entry.
        maxiter: most iterations of the method, at least 1.
        callback: called after each iteration with an ``OptimizeResult`` (``x``, ``params``, ``fun``, ``jac``, ``nit``,
            ``nfev``); raise ``StopIteration`` to end the search.
        options: further options of the method.
        backend: as in `hypergradient`.
        on_failure: as in `hypergradient`, but "warn" warns of the first failure only; ``history`` has them all.
        progress: show a bar (tqdm, if installed); None: where stderr is a terminal.

    Returns:
        An ``OptimizeResult``: ``x`` (the hyperparameters, with the structure of ``hparams0``), ``params``, ``fun``,
        ``jac``, ``nit``, ``nfev``, ``success``, ``status``, ``message``, and ``history``, an `Evaluation` for each
        hypergradient.

    Raises:
        TypeError, ValueError: for input that does not fit.
        SolverError: if a hypergradient is not finite, or failed and ``on_failure`` says so.

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

    def after_iteration(intermediate_result: optimize.OptimizeResult) -> None:
        nonlocal nit
        nit += 1
        here = search.accept(intermediate_result.x)
        advance(here["fun"])
        if callback is not None:
            callback(optimize.OptimizeResult(nit=nit, **here))

    with _progress_bar(maxiter, progress) as advance:
        found = optimize.minimize(
            search,
            x0,
            jac=True,
            method=method,
            bounds=None if bounds is None else box,
            callback=after_iteration,
            options={"maxiter": maxiter, **(options or {})},
        )
    # SciPy leaves nit and status out where the bounds leave nothing to search.
    ended = {key: found.get(key, 0) for key in ("nit", "success", "status", "message")}
    return optimize.OptimizeResult(**search.accept(found.x), **ended, history=search.history)


class _Point(NamedTuple, Generic[P, H]):
    x: np.ndarray
    hparams: H
    hg: Hypergradient[P, H]
    value: float
    grad: np.ndarray


@dataclasses.dataclass
class _Search(Generic[P, H]):
    """F and its hypergradient as SciPy calls them, and what they have seen."""

    problem: BilevelProblem
    fit: Callable[[H, P], P]
    params0: P | None
    method: Method
    backend: Backend
    hparams0: H
    box: optimize.Bounds
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
        """Make x the point that warm starts come from, and return what is known of it."""
        known = (point for point in (self.last, self.accepted) if point and np.array_equal(point.x, x))
        self.accepted = here = next(known, None) or self.evaluate(x)
        return {
            "x": here.hparams,
            "params": here.hg.params,
            "fun": here.value,
            "jac": here.hg.grad,
            "nfev": len(self.history),
        }

    def evaluate(self, x: np.ndarray) -> _Point[P, H]:
        backend, warm = self.backend, self.accepted
        x = x.copy()  # SciPy may go on to write to its own, and torch would share the memory
        hparams = backend.space(self.hparams0).unravel(backend.from_numpy(x))
        method, rtol = self._tightened()
        start: Any = self.copied(warm.hg.params) if warm else self.params0
        params = self.fit(hparams, start)
        if params is None:
            raise ValueError("fit: expected the params that it found, got None. Does it return them?")
        try:
            with warnings.catch_warnings():
                if any(evaluation.status != Status.CONVERGED for evaluation in self.history):
                    warnings.simplefilter("ignore", SolverWarning)  # the first has said it
                adjoint0 = warm.hg.adjoint if warm else None
                hg = hypergradient(self.problem, params, hparams, solver=method, adjoint0=adjoint0, **self.call)
        except SolverError as error:
            raise SolverError(
                f"{error} This was evaluation {len(self.history) + 1} of minimize, at hyperparameters from "
                f"{x.min():.3g} to {x.max():.3g}: bounds=(low, high) keeps a search where the inner problem can be "
                "solved."
            ) from error
        value, grad = float(backend.to_host(hg.value)), backend.to_flat(hg.grad)
        blocked = ((x <= self.box.lb) & (grad > 0)) | ((x >= self.box.ub) & (grad < 0))
        grad_norm = float(np.linalg.norm(np.where(blocked, 0.0, grad)))
        self.history.append(Evaluation(value, grad_norm, rtol, hg.info.steps, hg.info.status))
        return _Point(x, hparams, hg._replace(params=self.copied(hg.params)), value, grad)

    def copied(self, params: P) -> P:
        """Return params that no fit writes to, as one that trains in place would, and without a graph."""
        return self.backend.run(_copy, params)

    def _tightened(self) -> tuple[Method, float | None]:
        """Return the method with the tolerance that the progress so far calls for, and that tolerance."""
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
        raise ValueError(f"method: there is no {method!r} here." + suggest(str(method), TAKES_BOUNDS))
    method = known[method.lower()]
    if bounds is not None and not TAKES_BOUNDS[method]:
        raise ValueError(f'bounds: {method} takes none; use method="L-BFGS-B".')
    return method


def _box(bounds: Any, size: int) -> optimize.Bounds:
    if bounds is None:
        bounds = (-np.inf, np.inf)
    try:
        if isinstance(bounds, optimize.Bounds):
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
    return optimize.Bounds(*limits)


@contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances a bar and shows the value, or does nothing."""
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
