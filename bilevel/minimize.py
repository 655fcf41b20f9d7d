"""Hyperparameter search for those who have no loop of their own, in SciPy's style."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from bilevel.config import get_solver, suggest
from bilevel.errors import SolverError
from bilevel.failure import OnFailure
from bilevel.hypergradient import hypergradient
from bilevel.problem import Problem
from bilevel.protocols import Backend, Solver, Tree
from bilevel.results import Hypergradient, Status
from bilevel.validation import find_backend

LOOSEST_RTOL = 1e-2  # of the first linear solves: a line search still finds its way by such gradients
TAKES_BOUNDS = {"L-BFGS-B": True, "trust-constr": True, "BFGS": False, "CG": False}


class Evaluation(NamedTuple):
    """One evaluation of F and its hypergradient, as `minimize` records it."""

    value: float
    grad_norm: float  # of the part of the hypergradient that does not push against the bounds
    rtol: float | None  # asked of the linear solve; None for a solver without one
    steps: int
    status: Status


def minimize(
    problem: Problem,
    hparams0: Tree,
    *,
    fit: Callable[[Tree, Any], Tree],
    params0: Tree | None = None,
    inner_args: tuple[Any, ...] = (),
    outer_args: tuple[Any, ...] = (),
    solver: Any = "cg",
    method: str = "L-BFGS-B",
    bounds: Any = None,
    maxiter: int = 50,
    callback: Callable[[optimize.OptimizeResult], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    backend: Any = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
) -> optimize.OptimizeResult:
    """Minimize F(w*(λ), λ) over λ with `scipy.optimize.minimize`.

    At each λ, ``fit`` and the linear solve start from the solution and the adjoint of the last accepted λ: all trials
    of a line search start alike. The tolerance of a solver with an ``rtol`` follows the norm of the hypergradient
    down, from 1e-2 to the solver's own (approximate gradients, as in HOAG: Pedregosa, ICML 2016).

    Args:
        problem: the inner objective L and the outer objective F.
        hparams0: where to start: a tree of arrays of any backend.
        fit: ``fit(hparams, params0) -> params`` solves the inner problem from ``params0``; `bilevel.fit.scipy_fit`
            makes one.
        params0: what the first fit starts from, if it needs that.
        inner_args: further arguments of L.
        outer_args: further arguments of F.
        solver: as in `hypergradient`.
        method: of `scipy.optimize.minimize`: L-BFGS-B, trust-constr, BFGS or CG. All but the first two without
            bounds, all but L-BFGS-B and CG for few hyperparameters only (they keep a matrix).
        bounds: a pair (low, high) for all entries of λ, or SciPy's: a ``Bounds``, or a pair per entry.
        maxiter: most iterations of the method.
        callback: called after each iteration with an ``OptimizeResult`` (``x``, ``params``, ``fun``, ``jac``, ``nit``,
            ``nfev``); raise ``StopIteration`` to end the search.
        options: further options of the method.
        backend: as in `hypergradient`.
        on_failure: as in `hypergradient`, for each of them.
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
    backend_, solver = find_backend(backend, hparams0, hparams0), get_solver(solver)
    x0 = _to_host(backend_, hparams0)
    box = _box(bounds, x0.size)
    history: list[Evaluation] = []

    def evaluate(x: np.ndarray) -> _Point:
        hparams = backend_.space.unravel(backend_.from_numpy(x.copy()), hparams0)  # SciPy writes to its x
        tightened, rtol = _tighten(solver, history)
        try:
            hg = hypergradient(
                problem,
                fit(hparams, accepted.hg.params if accepted else params0),
                hparams,
                inner_args=inner_args,
                outer_args=outer_args,
                solver=tightened,
                adjoint0=accepted.hg.adjoint if accepted else None,
                backend=backend_,
                on_failure=on_failure,
            )
        except SolverError as error:
            where = f"from {x.min():.3g} to {x.max():.3g}" if x.size > 1 else f"of {x[0]:.3g}"
            raise SolverError(
                f"{error} This was evaluation {len(history) + 1} of minimize, at hyperparameters {where}: "
                "bounds=(low, high) keeps a search where the inner problem can be solved."
            ) from error
        value, grad = float(backend_.to_host(hg.value)), _to_host(backend_, hg.grad)  # pyright: ignore[reportArgumentType]
        slope = float(np.linalg.norm(np.clip(x - grad, box.lb, box.ub) - x))
        history.append(Evaluation(value, slope, rtol, hg.info.steps, hg.info.status))
        return _Point(x.copy(), hparams, hg, value, grad)

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal accepted, last, scale
        last = evaluate(x)
        if accepted is None:
            accepted, scale = last, 1.0 / (history[0].grad_norm or 1.0)
        return scale * last.value, scale * last.grad

    def accept(x: np.ndarray) -> dict[str, Any]:
        nonlocal accepted
        points = (p for p in (last, accepted) if p and np.array_equal(p.x, x))
        accepted = next(points, None) or evaluate(x)
        hg = accepted.hg
        return {
            "x": accepted.hparams,
            "params": hg.params,
            "fun": accepted.value,
            "jac": hg.grad,
            "nfev": len(history),
        }

    def after_iteration(intermediate_result: optimize.OptimizeResult) -> None:
        nonlocal nit
        nit += 1
        here = accept(intermediate_result.x)
        advance(here["fun"])
        if callback is not None:
            callback(optimize.OptimizeResult(nit=nit, **here))

    nit, accepted, last, scale = 0, None, None, 1.0
    with _progress_bar(maxiter, progress) as advance:
        found = optimize.minimize(
            function,
            x0,
            jac=True,
            method=method,
            bounds=None if bounds is None else box,
            callback=after_iteration,
            options={"maxiter": maxiter, **(options or {})},
        )
    ended = {key: found[key] for key in ("nit", "success", "status", "message")}
    return optimize.OptimizeResult(**accept(found.x), **ended, history=history)


class _Point(NamedTuple):
    x: np.ndarray
    hparams: Tree
    hg: Hypergradient
    value: float
    grad: np.ndarray


def _to_host(backend: Backend, tree: Tree) -> np.ndarray:
    return backend.to_numpy(backend.space.ravel(tree)).astype(np.float64)


def _tighten(solver: Solver, history: list[Evaluation]) -> tuple[Solver, float | None]:
    """Return the solver with the tolerance that the progress so far calls for, and that tolerance."""
    if not (dataclasses.is_dataclass(solver) and hasattr(solver, "rtol")):
        return solver, None
    progress = min(e.grad_norm for e in history) / (history[0].grad_norm or 1.0) if history else 1.0
    rtol = max(float(solver.rtol), LOOSEST_RTOL * progress)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(solver, rtol=rtol), rtol  # pyright: ignore[reportReturnType]


def _check_method(method: str, bounds: Any) -> str:
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
    if isinstance(bounds, optimize.Bounds):
        low, high = bounds.lb, bounds.ub
    elif len(bounds) == 2 and np.ndim(bounds[0]) == 0:
        low, high = bounds
    else:
        low, high = zip(*bounds, strict=True)
    return optimize.Bounds(*(np.broadcast_to(np.asarray(b, float), size) for b in (low, high)))


@contextmanager
def _progress_bar(total: int, show: bool | None) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances a bar and shows the value, or does nothing."""
    try:
        if not (sys.stderr.isatty() if show is None else show):
            raise ImportError
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda value: None
        return
    with tqdm(total=total, desc="minimize", unit="iteration") as bar:

        def advance(value: float) -> None:
            bar.set_postfix(value=f"{value:.5g}", refresh=False)
            bar.update()

        yield advance
