"""The two ways a solve can speak up, and help with a mistyped name. Bad input raises a built-in error."""

import difflib
from collections.abc import Iterable


class SolverError(RuntimeError):
    """A solve failed and ``on_failure="raise"`` was asked for, or its result is not finite."""


class SolverWarning(UserWarning):
    """A solve failed and ``on_failure="warn"`` (the default) was asked for."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" and the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" There is: {', '.join(known) or 'none'}."
