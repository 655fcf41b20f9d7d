"""Warn or raise if a solve failed."""

import sys
import warnings
from collections.abc import Callable
from typing import Literal, get_args

from bilevel.backend import Backend
from bilevel.errors import SolverError, SolverWarning, counted
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.options import check_choice
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array

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
    hint: str = "",
) -> SolverInfo:
    """Return the info of a solve in Python numbers, and warn or raise if the solve failed.

    Traced info is returned unchanged. If the result is not finite, "warn" also raises. Only the text of an error has
    numbers of the spectrum. So a warning takes no products, and its text stays the same: Python shows it once.

    ``curvature`` is a function that estimates the spectrum of the undamped operator. ``hint`` ends the message.
    """
    numbers = [backend.to_host(x) if hasattr(x, "dtype") else x for x in info]
    if numbers[3] is None:
        return info
    steps, residual_norm, rhs_norm, status, inner_grad_norm = numbers
    info = SolverInfo(int(steps), residual_norm, rhs_norm, Status(int(status)), inner_grad_norm)
    method.record(info)
    if on_failure == "ignore" or not method.failed(info.status):
        return info
    if on_failure == "raise" or info.status == Status.NON_FINITE:
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


def callers_level() -> int:
    """Return the stacklevel of the line that called the library or a backend, for a warning in the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("bilevel"):
        level, frame = level + 1, frame.f_back
    return level
