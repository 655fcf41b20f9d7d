"""Warn or raise if a solve failed."""

import sys
import warnings
from collections.abc import Callable
from math import isnan
from typing import Any, Literal, get_args

from bilevel.backend import Backend
from bilevel.errors import InnerProblemWarning, SolverError, SolverWarning, counted
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.options import check_choice
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array

FAR = 0.2
SMALL = 1e-3
UNSOLVED = (
    "params do not solve the inner problem. To first order, the outer objective differs by more than "
    f"{FAR:.0%} at the solution (info.value_error), and a hypergradient is only right there. Train the inner problem "
    "further. If a bound or a kink such as |w| holds params where they are, use bl.FixedPoint of a projected or "
    'proximal step. If the training ends elsewhere on purpose, use solver="unrolled". bl.diagnose tells which it is. '
    'If this is intended, call warnings.simplefilter("ignore", bl.InnerProblemWarning).'
)
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
) -> SolverInfo:
    """Return the info of a solve in Python numbers, and warn or raise if the solve failed.

    Traced info is returned unchanged. If the result is not finite, "warn" also raises. Only the text of an error has
    numbers of the spectrum. So a warning takes no products, and its text stays the same: Python shows it once.

    ``curvature`` is a function that estimates the spectrum of the undamped operator. ``locate`` is a function that
    names the first quantity that is not finite, or returns "". ``hint`` ends the message.
    """
    numbers = SolverInfo(*[backend.to_host(x) if hasattr(x, "dtype") else x for x in info])
    if numbers.status is None:
        return info
    info = numbers._replace(steps=int(numbers.steps), status=Status(int(numbers.status)))
    method.record(info)
    if on_failure == "ignore" or not method.failed(info.status):
        return info
    if info.status == Status.NON_FINITE:
        located = "" if locate is None or backend.requires_all_ranks else locate()
        why = located or method.explain(info, symmetric, None)
        raise SolverError(
            f'{method.name}: {why} No hypergradient is returned. on_failure="ignore" returns the nan.{hint}'
        )
    if on_failure == "raise":
        seen = None
        curved = info.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED) and symmetric
        if curved and curvature is not None and not backend.requires_all_ranks:
            seen = Spectrum(*[float(backend.to_host(x)) for x in curvature()])
        left = f"{info.residual_norm:.2g} of a right-hand side of {info.rhs_norm:.2g}"
        why = method.explain(info, symmetric, seen)
        raise SolverError(f"{method.name}: {why} The residual is {left}, after {counted(info.steps, 'step')}.{hint}")
    text = f"{method.name}: {method.explain(info, symmetric, None)} info has the numbers.{hint}"
    warnings.warn(SolverWarning(text), stacklevel=callers_level())
    return info


def warn_if_far(backend: Backend, value: Any, info: SolverInfo, params: object) -> None:
    """Warn if, to first order, the outer objective differs by more than a share `FAR` at the solution.

    ``value`` is the outer objective. If it or the info is traced, if the solve failed, or if its residual is unknown
    (``identity``, whose v has another scale than the solution), there is no warning.

    If a relative change `SMALL` of params changes the outer objective by more than its value, the value is close to
    zero and no scale. Then this change is the scale.
    """
    error = info.value_error
    if info.status is not Status.CONVERGED or not error:  # a traced status is no `Status`
        return
    if isnan(info.residual_norm):
        return
    outer = backend.to_host(value) if hasattr(value, "dtype") else value
    if outer is None or not abs(error) > FAR * abs(outer):
        return
    norm = float(backend.to_host(backend.run(_norm, params)))
    if abs(error) > FAR * SMALL * info.rhs_norm * norm:
        warnings.warn(InnerProblemWarning(UNSOLVED), stacklevel=callers_level())


def _norm(backend: Backend, params: object) -> Array:
    return backend.space(params).norm(params)


def callers_level() -> int:
    """Return the stacklevel of the user's line: the innermost line outside of the library and the frameworks.

    The frameworks call the library when they trace or differentiate.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("bilevel", "jax.", "torch.", "scipy.")
    ):
        level, frame = level + 1, frame.f_back
    return level
