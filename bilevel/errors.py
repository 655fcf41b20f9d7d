"""Errors and warnings, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable


class SolverError(RuntimeError):
    """A solve failed with ``on_failure="raise"``, or its result is not finite."""


class SolverWarning(UserWarning):
    """A solve failed with ``on_failure="warn"`` (the default)."""


class InnerProblemWarning(UserWarning):
    """Params do not solve the inner problem, so the hypergradient differs from the derivative of F(w*(λ), λ)."""


class DependenceWarning(UserWarning):
    """An objective does not depend on an argument, or depends on a trainable array that is no argument.

    If it is meant, ignore the category: ``warnings.simplefilter("ignore", bl.DependenceWarning)``.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" and the list of known names."""
    names = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    listed = ", ".join(names.values()) or "none"
    return (f" Did you mean {names[close[0]]!r}?" if close else "") + f" There is: {listed}."
