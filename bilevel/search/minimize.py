"""Hyperparameter search with SciPy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.convergence import OnFailure
from bilevel.errors import InnerProblemWarning
from bilevel.hypergradient import SolverSpec
from bilevel.messages import callers_level, suggest
from bilevel.methods.implicit import as_method
from bilevel.options import check_count
from bilevel.problems.protocols import BilevelProblem
from bilevel.search.evaluations import Search
from bilevel.spaces.array import Args, H, P
from bilevel.trainings import check_fit
from bilevel.validation import find_backend

ARGUMENTS = {  # the further arguments that each method accepts
    "L-BFGS-B": {"bounds"},
    "BFGS": set(),
    "CG": set(),
    "SLSQP": {"bounds", "constraints"},
    "trust-constr": {"bounds", "constraints"},
}
NO_STEP_STATUS = {"L-BFGS-B": 2, "BFGS": 2, "CG": 2, "SLSQP": 8}
NO_STEP = (
    "The line search found no step along which the outer objective decreases as the hypergradient predicts. Near a "
    "minimum, this is the noise of fit. Elsewhere, check that fit uses its hyperparameters, and make it more accurate."
)


def minimize(
    problem: BilevelProblem,
    hparams0: H,
    *,
    fit: Callable[[H, P], P],
    params0: P | None = None,
    inner_args: Args = (),
    outer_args: Args = (),
    solver: SolverSpec = "cg",
    method: str | Callable[..., scipy.optimize.OptimizeResult] = "L-BFGS-B",
    bounds: scipy.optimize.Bounds | Sequence[object] | None = None,
    constraints: Any = (),
    tol: float | None = None,
    maxiter: int = 50,
    callback: Callable[[scipy.optimize.OptimizeResult], object] | None = None,
    options: Mapping[str, object] | None = None,
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
    progress: bool | None = None,
    resume: Mapping[str, Any] | None = None,
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
            With constraints, SLSQP (which stores a matrix) or trust-constr. Or a function, as SciPy calls it:
            ``method(fun, x0, *, jac, bounds, callback, maxiter, **further) -> OptimizeResult``, for example around an
            optimizer of optax. It calls ``callback(OptimizeResult(x=x))`` after each iteration.
        bounds: a pair (low, high) for all entries of λ, a SciPy ``Bounds``, or a pair per entry. None is no bound.
        constraints: a constraint of SciPy (``LinearConstraint``, ``NonlinearConstraint``, a dict), or a list of them.
            Their functions receive the entries of all leaves of λ as a float64 NumPy array of shape (n,).
        tol: as in `scipy.optimize.minimize`. F is divided by the norm of the first hypergradient, so it is relative.
        maxiter: maximum number of iterations of the method, at least 1.
        callback: called after each iteration with an ``OptimizeResult`` (``x``, ``params``, ``fun``, ``jac``, ``nit``,
            ``nfev``, ``state``). Raise ``StopIteration`` in it to stop the search.
        options: further options of the method.
        on_failure: as in `hypergradient`, but "warn" only warns about the first failure. ``history`` has all failures.
        progress: show a bar (tqdm, if installed). None: only if stderr is a terminal.
        resume: the ``state`` of an earlier result, or of a callback. The search then gives the same bits as without the
            interruption, if all other arguments are the same (``maxiter`` counts from the first start) and ``fit``
            depends only on its arguments. The state has the arrays of params and hparams, NumPy arrays, lists, numbers
            and strings. SciPy repeats the recorded iterations without ``fit`` and without the callback.

    Returns:
        An ``OptimizeResult``: ``x`` (the hyperparameters, with the structure of ``hparams0``), ``params``, ``fun``,
        ``jac``, ``nit``, ``nfev``, ``success``, ``status``, ``message``, ``history`` (an
        `bilevel.search.evaluations.Evaluation` for each hypergradient), and ``state``, for ``resume``. Its text leaves
        out ``state``, and counts the evaluations of ``history``. ``success`` is False if ``fit`` leaves the inner
        problem unsolved at ``x``: if, to first order, that changes F by more than 1e-4 of F or of its decrease in the
        search (3e-3 for params in float32). Then ``status`` is -1.

    Raises:
        TypeError, ValueError, SolverError: as in `hypergradient`.

    Warns:
        InnerProblemWarning: if ``fit`` leaves the inner problem unsolved, unless ``on_failure="ignore"``.
        SolverWarning, DependenceWarning: as in `hypergradient`.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> bl.minimize(problem, np.zeros(2), fit=lambda hparams, _: hparams / 2).x.round(3)
    array([2., 2.])
    """
    from bilevel.search.result import SearchResult  # loads scipy.optimize

    chosen = _check_method(method, bounds=bounds, constraints=constraints)
    check_count("maxiter", maxiter)
    check_fit(fit)
    backend = find_backend(backend, hparams0, hparams0, ("hparams0", "hparams0"))
    x0 = backend.to_flat(hparams0)
    box = _box(bounds, x0.size)
    call = {"inner_args": inner_args, "outer_args": outer_args, "backend": backend, "on_failure": on_failure}
    search = Search(problem, fit, params0, as_method(get_solver(solver)), backend, hparams0, box, call)
    if resume is not None:
        search.load(resume)
    nit = 0

    def after_iteration(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal nit
        nit += 1
        repeated = search.repeated
        search.accept(getattr(intermediate_result, "x", intermediate_result))  # SLSQP of old versions passes x
        advance(search.here.value)
        if callback is not None and not repeated:
            callback(SearchResult(nit=nit, **search.results()))

    with _progress_bar(maxiter, progress) as advance:
        found = scipy.optimize.minimize(
            search,
            x0,
            jac=True,
            method=chosen,
            bounds=None if bounds is None else box,
            constraints=constraints,
            tol=tol,
            callback=after_iteration,
            options={"maxiter": maxiter, **(options or {})},
        )
    # If the bounds fix all entries, SciPy returns no nit and status.
    ended: dict[str, Any] = {"nit": 0, "success": 0, "status": 0, "message": "", **found}
    ended = {key: ended[key] for key in ("nit", "success", "status", "message")}
    search.accept(found.x)
    if ended["status"] == NO_STEP_STATUS.get(chosen):
        ended["message"] = f"{NO_STEP} SciPy's message: {ended['message']}"
    if (unsolved := search.unsolved()) is not None:
        ended |= {"success": False, "status": -1, "message": f"{unsolved} SciPy's message: {ended['message']}"}
        if on_failure != "ignore":
            warnings.warn(InnerProblemWarning(f"minimize: {unsolved}"), stacklevel=callers_level())
    return SearchResult(**search.results(), **ended, history=search.history)


def _check_method(method: Any, **given: Any) -> Any:
    if callable(method):
        return method
    known = {name.lower(): name for name in ARGUMENTS}
    if str(method).lower() not in known:
        raise ValueError(f"method: minimize does not support {method!r}." + suggest(str(method), ARGUMENTS))
    method = known[method.lower()]
    for name, value in given.items():
        absent = value is None or (isinstance(value, list | tuple) and not value)
        if not absent and name not in ARGUMENTS[method]:
            others = " or ".join(f'"{other}"' for other, accepted in ARGUMENTS.items() if name in accepted)
            raise ValueError(f"{name}: {method} does not accept {name}; use method={others}.")
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
        limits = [_limit(low, -np.inf, size), _limit(high, np.inf, size)]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            "bounds: expected (low, high), two numbers for all entries, scipy.optimize.Bounds(low, high) with arrays, "
            f"or a pair for each of {size} entries, got {bounds!r}."
        ) from error
    if np.isnan(limits).any():
        raise ValueError(f"bounds: nan is no bound, got {bounds!r}. For an entry without a bound, write None.")
    return scipy.optimize.Bounds(*limits)


def _limit(given: Any, absent: float, size: int) -> np.ndarray:
    """Return the limits of all entries on one side. ``absent`` is the limit in place of None."""
    given = absent if given is None else given
    entries = [absent if limit is None else limit for limit in given] if isinstance(given, list | tuple) else given
    return np.broadcast_to(np.asarray(entries, float), size)


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
