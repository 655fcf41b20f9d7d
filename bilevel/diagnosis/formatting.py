"""Formats of numbers and texts in a report."""

from decimal import ROUND_DOWN, ROUND_UP, Context
from math import isfinite


def percent(x: float) -> str:
    """Return a share as a percentage.

    >>> percent(0.0123), percent(1.08), percent(-4e-6)
    ('1%', '108%', '-0.0004%')
    """
    return f"{100 * x:.{'0f' if 0.01 <= abs(x) < 100 else '1g'}}%"


def first_line(text: str, width: int) -> str:
    """Return the first line of a text, cut to a width."""
    line = text.partition("\n")[0]
    return line if len(line) <= width else line[: width - 3] + "..."


def rounded(x: float, up: bool) -> float:
    """Return a positive number rounded to two digits, up or down, so that a bound stays valid.

    >>> rounded(0.01234, up=True), rounded(0.01234, up=False), rounded(0.09999999999999999, up=False)
    (0.013, 0.012, 0.099)
    """
    if not (isfinite(x) and x > 0):
        return x
    return float(Context(prec=2, rounding=ROUND_UP if up else ROUND_DOWN).create_decimal(repr(float(x))))
