"""Warn or raise if a solve failed. Warn if params do not solve the inner problem."""

import warnings
from collections.abc import Callable
from math import isnan
from typing import Any, Literal, get_args

import numpy as np

from bilevel.backend import Backend
from bilevel.errors import InnerProblemWarning, SolverError, SolverWarning
from bilevel.messages import callers_level, counted, listed
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.options import check_choice
from bilevel.problems.constrained import Constrained
from bilevel.problems.gradients import in_params
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Args, Array

UNSOLVED_SHARE = 0.2  # of F, to first order, with a warning
UNTRAINED_SHARE = 0.01  # the same at params of zero, which most often are untrained
UNBALANCED = 0.01  # of ‖∂L/∂w‖: a larger residual of KKT conditions has a warning
SMALL = 1e-3  # change of params; F is close to zero if this changes F by more than its value
UNSOLVED = (
    "params do not solve the inner problem. To first order, the outer objective differs by more than "
    f"{UNSOLVED_SHARE:.0%} at the solution ({UNTRAINED_SHARE:.0%} for params of zero; see info.value_error), and a "
    "hypergradient is only right there. Train the inner problem further. If a bound or a kink such as |w| holds params "
    "where they are, use bl.Projected or bl.Proximal. If the training ends elsewhere on purpose, use "
    'solver="unrolled". bl.diagnose finds the cause. If this is intended, call '
    'warnings.simplefilter("ignore", bl.InnerProblemWarning).'
)
AT_KINK = (
    "params is at a kink of the proximal step, or of an inequality, to rounding (see info.kinks): an entry is just "
    "about to leave or to reach a kink, a bound or a constraint. The solution map has no derivative there, and the "
    "hypergradient belongs to one side of the kink. bl.diagnose names the entries. Change the hyperparameters a "
    "little, or solve the inner problem more accurately. If this is intended, call "
    'warnings.simplefilter("ignore", bl.InnerProblemWarning).'
)
NOT_KKT = (
    "params do not satisfy the KKT conditions, and a hypergradient is only right where they do (info.inner_grad_norm "
    "is the norm of their residual). Either the constraints do not hold, or multipliers have another sign or scale: "
    "bl.Constrained needs ∂L/∂w + (∂h/∂w)ᵀν + (∂g/∂w)ᵀμ = 0 with μ >= 0. Call "
    "bl.with_multipliers(problem, params['w'], hparams) to compute them."
)
NUMBERS = 'For the numbers, see hg.info, or pass on_failure="raise".'
OnFailure = Literal["raise", "warn", "ignore"]


def check_on_failure(on_failure: str) -> None:
    """Raise a ValueError unless the string is one of the three choices."""
    check_choice("on_failure", on_failure, get_args(OnFailure))


def report(
    backend: Backend,
    info: SolverInfo,
    method: Method,
    on_failure: OnFailure,
    *,
    symmetric: bool = True,
    curvature: Callable[[], Spectrum[Array]] | None = None,
    locate: Callable[[], str] | None = None,
    hint: str = "",
    where: str = "",
) -> SolverInfo:
    """Return the info of a solve in Python numbers, and warn or raise if the solve failed.

    Traced info is returned unchanged. Under a derivative of JAX, only some of its numbers are traced, and they stay so.
    If the result is not finite, "warn" also raises. Only the text of an error has numbers of the spectrum. So a warning
    takes no products, and its text stays the same: Python shows it once.

    Args:
        symmetric: whether the operator is symmetric.
        curvature: a function that estimates the spectrum of the undamped operator.
        locate: a function that names the first quantity that is not finite, or returns "".
        hint: the end of the message, after a space.
        where: a part of the message after the name of the method.
    """
    numbers = SolverInfo(*[backend.to_host(x) if hasattr(x, "dtype") else x for x in info])
    if numbers.status is None:
        return info
    known = {name: number for name, number in numbers._asdict().items() if number is not None}
    info = info._replace(**known | {"steps": int(numbers.steps), "status": Status(int(numbers.status))})
    traced = None in (numbers.residual_norm, numbers.rhs_norm)
    if not traced and isnan(numbers.residual_norm):  # v may have another scale than the solution, as with ``identity``
        info = info._replace(value_error=float("nan"))
    method.record(info)
    if on_failure == "ignore" or not method.failed(info.status):
        return info
    if info.status == Status.NON_FINITE:
        why = (locate and locate()) or method.explain(info, symmetric, None)
        raise SolverError(
            f'{method.name}{where}: {why} No hypergradient is returned. on_failure="ignore" returns the nan.{hint}'
        )
    if on_failure == "raise":
        eigenvalues = None
        curved = info.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED) and symmetric
        if curved and not traced and curvature is not None and not backend.requires_all_ranks:
            eigenvalues = Spectrum(*[float(backend.to_host(x)) for x in curvature()])
        end = f"after {counted(info.steps, 'step')}."
        if traced:
            end = f"It stopped {end}"
        else:
            end = f"The residual is {info.residual_norm:.2g} of a right-hand side of {info.rhs_norm:.2g}, {end}"
        raise SolverError(f"{method.name}{where}: {method.explain(info, symmetric, eigenvalues)} {end}{hint}")
    text = f"{method.name}{where}: {method.explain(info, symmetric, None)} {NUMBERS}{hint}"
    warnings.warn(SolverWarning(text), stacklevel=callers_level())
    return info


def report_rows(
    backend: Backend,
    info: SolverInfo,
    values: Any,
    params: object,
    method: Method,
    on_failure: OnFailure,
    *,
    symmetric: bool = True,
) -> SolverInfo:
    """Return the info of Q solves as NumPy arrays of shape (Q,), and report the worst of the failed solves by `report`.

    Info with traced arrays is returned unchanged. `warn_if_unsolved` judges the sums over the queries. ``values`` are
    the F_q.
    """
    if any(backend.to_host(x[0]) is None for x in info):
        return info
    info = SolverInfo(*map(backend.to_numpy, info))
    failed = np.flatnonzero(method.failed(info.status))
    unknown = np.isnan(info.residual_norm)
    info = info._replace(value_error=np.where(unknown, np.nan, info.value_error))
    if on_failure != "ignore" and len(failed):
        worst = SolverInfo(*[x[failed[info.status[failed].argmax()]] for x in info])
        where = f" for {counted(len(failed), 'query', 'queries')} of {len(info.status)} ({listed(failed)})"
        hint = " bl.hypergradient with one of these queries tells more."
        report(backend, worst, method, on_failure, symmetric=symmetric, where=where, hint=hint)
    elif on_failure != "ignore":
        total = SolverInfo(*[float(np.abs(x).sum()) for x in info])._replace(status=Status(info.status.max()))
        warn_if_unsolved(backend, np.abs(backend.to_numpy(values)).sum(), total, params)
    return info


def warn_if_unsolved(backend: Backend, value: Any, info: SolverInfo, params: object) -> None:
    """Warn if params is at a kink of a proximal step, or does not solve the inner problem.

    There is a warning if, to first order, F(params) differs from F(w*) by more than `UNSOLVED_SHARE` or
    `UNTRAINED_SHARE` of it.

    ``value`` is F(params). If it or the info is traced, if the solve failed, or if ``value_error`` is unknown, there is
    no warning.

    If a relative change `SMALL` of params changes F by more than its value, the value is close to zero and no scale.
    Then this change is the scale.
    """
    warn_if_at_kink(info)
    error = info.value_error
    known = info.status is Status.CONVERGED and isinstance(error, float)
    if not known or not error:
        return
    outer = backend.to_host(value) if hasattr(value, "dtype") else value
    if outer is None or not abs(error) > UNTRAINED_SHARE * abs(outer):
        return
    norm = float(backend.to_host(backend.run(_norm, params)))
    share = UNSOLVED_SHARE if norm else UNTRAINED_SHARE
    if abs(error) > share * max(abs(outer), SMALL * info.rhs_norm * norm):
        warnings.warn(InnerProblemWarning(UNSOLVED), stacklevel=callers_level())


def warn_if_at_kink(info: SolverInfo) -> None:
    """Warn if params is at a kink of a proximal step, unless the number of kinks is traced."""
    if isinstance(info.kinks, float) and info.kinks > 0:  # traced numbers have other types
        warnings.warn(InnerProblemWarning(AT_KINK), stacklevel=callers_level())


def warn_if_not_kkt(
    backend: Backend, problem: BilevelProblem, params: Any, hparams: object, args: Args, info: SolverInfo
) -> None:
    """Warn if params of a `bl.Constrained` do not satisfy the KKT conditions, unless info is traced.

    `warn_if_unsolved` does not see wrong multipliers: to first order, F does not depend on them.
    """
    if not isinstance(problem, Constrained) or not isinstance(info.inner_grad_norm, float | np.ndarray):
        return
    left = float(np.max(info.inner_grad_norm))
    if left > SMALL * float(backend.to_host(backend.run(_norm, params))):
        slope = float(backend.to_host(backend.run(_slope, problem, params["w"], hparams, args)))
        if left > UNBALANCED * slope:
            warnings.warn(InnerProblemWarning(NOT_KKT), stacklevel=callers_level())


def _slope(backend: Backend, problem: Constrained, w: object, hparams: object, args: Args) -> Array:
    return backend.space(w).norm(in_params(backend, problem.objective, w, hparams, args).grad_params)


def _norm(backend: Backend, params: object) -> Array:
    return backend.space(params).norm(params)
