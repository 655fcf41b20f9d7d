"""Solver options and their checks. The checks accept arrays in place of numbers, because an array may be traced."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def is_python_value(value: Any) -> bool:
    """Tell whether a value is a number or string of Python, or None. An array may be traced or on a device."""
    return isinstance(value, str | bytes | bool | Real) or value is None


def check_real(
    solver: Any,
    *options: str,
    above: float | None = None,
    least: float = 0.0,
    below: float = float("inf"),
    none: bool = False,
    auto: bool = False,
) -> None:
    """Raise a TypeError unless each option is a number, and a ValueError unless it is finite and within the bounds.

    It must be > ``above``, or else >= ``least``, and < ``below``. With ``none``, it may also be None, and with ``auto``
    also "auto".
    """
    bound = f">= {least:g}" if above is None else f"> {above:g}"
    bound += " or None" if none else ""
    bound += ' or "auto"' if auto else ""
    bound += f" and < {below:g}" if below < float("inf") else ""
    for option in options:
        value = getattr(solver, option)
        if auto and isinstance(value, str) and value == "auto":
            continue
        if (none and value is None) or (not is_python_value(value) and hasattr(value, "dtype")):
            continue
        message = f"{type(solver).__name__}.{option}: expected a finite number {bound}, got {value!r}."
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(message)
        number = float(value)
        if not ((number >= least if above is None else number > above) and number < below):
            raise ValueError(message)


def check_int(solver: Any, *options: str, least: int) -> None:
    """Raise a TypeError unless each option is an integer, and a ValueError unless it is >= ``least``."""
    for option in options:
        value = getattr(solver, option)
        message = f"{type(solver).__name__}.{option}: expected an integer >= {least}, got {value!r}."
        if isinstance(value, bool) or not isinstance(value, Integral):
            static = " It must be a number of Python, and static under jit." if hasattr(value, "dtype") else ""
            raise TypeError(message + static)
        if value < least:
            raise ValueError(message)


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless an argument of a function is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[Any]) -> None:
    """Raise a ValueError unless a value is one of the choices. Suggest the most similar string."""
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    words = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(value, words, n=1, cutoff=0.5) if isinstance(value, str) else []
    listed = ", ".join(f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in choices[:-1])
    raise ValueError(
        f'{name}: expected {listed} or "{choices[-1]}", got {value!r}.'
        + (f' Did you mean "{close[0]}"?' if close else "")
    )


def check_step_size(solver: Any) -> None:
    """Raise a TypeError or ValueError unless ``step_size`` is a positive number or "auto"."""
    if not isinstance(solver.step_size, str):
        check_real(solver, "step_size", above=0)
    elif solver.step_size != "auto":
        name = type(solver).__name__
        raise ValueError(f'{name}.step_size: expected a number > 0 or "auto", got {solver.step_size!r}.')


def summary(owner: Any) -> str:
    """Return the text of a solver, a frozen dataclass, with only the options that differ from their defaults."""
    options = [(field.name, getattr(owner, field.name), field.default) for field in fields(owner)]
    given = ", ".join(f"{name}={value!r}" for name, value, default in options if value is not default)
    return f"{type(owner).__name__}({given})"
