"""Checks of solver options. A number that is an array of a framework passes: it may be traced."""

from numbers import Integral, Real
from typing import Any


def is_python_number(value: Any) -> bool:
    """Tell whether a value can be looked at: an array, which may be traced or on a device, can not."""
    return isinstance(value, str | bytes | bool | Real) or value is None


def check_real(solver: Any, option: str, *, above: float | None = None, least: float | None = None) -> None:
    """Raise unless the option is a finite number, > ``above`` or >= ``least``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    value = getattr(solver, option)
    if not is_python_number(value) and hasattr(value, "dtype"):
        return
    bound = f"> {above:g}" if above is not None else f">= {least:g}"
    what = f"{type(solver).__name__}.{option}: expected a finite number {bound}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(what)
    number = float(value)
    in_range = number > above if above is not None else number >= (least or 0.0)
    if not in_range or number == float("inf"):
        raise ValueError(what)


def check_int(solver: Any, option: str, *, least: int) -> None:
    """Raise unless the option is an integer >= ``least``.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is out of range.
    """
    value = getattr(solver, option)
    what = f"{type(solver).__name__}.{option}: expected an integer >= {least}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(what)
    if value < least:
        raise ValueError(what)
