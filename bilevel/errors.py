"""The two ways a solve can speak up, and help with a mistyped name. Bad input raises a built-in error."""

import difflib
from collections.abc import Iterable


class SolverError(RuntimeError):
    """A solve failed and ``on_failure="raise"`` was asked for, or its result is not finite."""


class SolverWarning(UserWarning):
    """A solve failed and ``on_failure="warn"`` (the default) was asked for."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" and the list of what there is."""
    names = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    listed = ", ".join(names.values()) or "none"
    return (f" Did you mean {names[close[0]]!r}?" if close else "") + f" There is: {listed}."
