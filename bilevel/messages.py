"""Parts of messages: counts, lists, suggestions for mistyped names, and the line that a warning is about."""

import difflib
import sys
from collections.abc import Iterable


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def listed(items: Iterable[object], most: int = 4) -> str:
    """Return some items as text.

    >>> listed("abcdef")
    'a, b, c, d and 2 more'
    >>> listed("ab")
    'a and b'
    """
    texts = [str(item) for item in items]
    if len(texts) > most:
        return f"{', '.join(texts[:most])} and {len(texts) - most} more"
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def callers_level() -> int:
    """Return the stacklevel of the user's line: the innermost line outside of the library and the frameworks.

    The frameworks call the library when they trace or differentiate.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("bilevel", "jax.", "torch.", "scipy.", "transformers.")
    ):
        level, frame = level + 1, frame.f_back
    return level


SYNONYMS = {
    "conjugate_gradient": ("cg",),
    "conjugate_gradients": ("cg",),
    "hessian_free": ("cg",),
    "direct": ("exact",),
    "dense": ("exact",),
    "inverse": ("exact",),
    "lissa": ("neumann",),
    "unroll": ("unrolled",),
    "itd": ("unrolled",),
    "one_step": ("identity",),
    "lr": ("step_size",),
    "learning_rate": ("step_size",),
    "alpha": ("step_size",),
    "eta": ("step_size",),
    "steps": ("terms", "maxiter", "rank"),
    "num_steps": ("steps", "terms", "maxiter"),
    "iterations": ("maxiter", "terms", "steps"),
    "max_iter": ("maxiter", "terms", "steps", "max_restarts"),
    "maxiter": ("terms", "steps", "max_restarts"),
    "k": ("terms", "steps", "maxiter", "rank"),
    "tol": ("rtol",),
    "tolerance": ("rtol",),
    "ridge": ("damping",),
    "lambda": ("damping",),
    "reg": ("damping",),
    "rho": ("damping",),
}
"""Other names in use for solvers and options, and our names for them. The first that is known is meant."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" and the list of known names."""
    names = {each.lower(): each for each in sorted(known)}
    written = str(name).lower()
    meant = SYNONYMS.get(written.replace("-", "_").replace(" ", "_"), ())
    close = [each for each in meant if each in names] or difflib.get_close_matches(written, names, n=1, cutoff=0.5)
    every = ", ".join(names.values()) or "none"
    return (f" Did you mean {names[close[0]]!r}?" if close else "") + f" There is: {every}."
