"""Solver options and their checks. A number that is an array of a framework passes: it may be traced."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def is_python_value(value: Any) -> bool:
    """Tell whether a value can be looked at: an array, which may be traced or on a device, can not."""
    return isinstance(value, str | bytes | bool | Real) or value is None


def check_real(
    solver: Any, option: str, *, above: float | None = None, least: float | None = None, below: float = float("inf")
) -> None:
    """Raise unless the option is a finite number, > ``above`` or >= ``least``, and < ``below``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    value = getattr(solver, option)
    if not is_python_value(value) and hasattr(value, "dtype"):
        return
    bound = f"> {above:g}" if above is not None else f">= {least:g}"
    bound += f" and < {below:g}" if below < float("inf") else ""
    what = f"{type(solver).__name__}.{option}: expected a finite number {bound}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(what)
    number = float(value)
    in_range = number > above if above is not None else number >= (least or 0.0)
    if not in_range or not number < below:
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


def check_choice(solver: Any, option: str, choices: Sequence[Any]) -> None:
    """Raise a ValueError unless the option is one of the choices; suggest the nearest word."""
    value = getattr(solver, option)
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    words = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(value, words, n=1, cutoff=0.5) if isinstance(value, str) else []
    listed = ", ".join(f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in choices[:-1])
    raise ValueError(
        f'{type(solver).__name__}.{option}: expected {listed} or "{choices[-1]}", got {value!r}.'
        + (f' Did you mean "{close[0]}"?' if close else "")
    )


def check_step_size(solver: Any) -> None:
    """Raise unless ``step_size`` is a positive number or "auto".

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range or another word.
    """
    if not isinstance(solver.step_size, str):
        check_real(solver, "step_size", above=0)
    elif solver.step_size != "auto":
        name = type(solver).__name__
        raise ValueError(f'{name}.step_size: expected a number > 0 or "auto", got {solver.step_size!r}.')


def summary(owner: Any) -> str:
    """Return a solver, a frozen dataclass, with only the options that differ from their defaults."""
    options = [(field.name, getattr(owner, field.name), field.default) for field in fields(owner)]
    given = ", ".join(f"{name}={value!r}" for name, value, default in options if value is not default)
    return f"{type(owner).__name__}({given})"
