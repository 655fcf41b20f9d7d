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


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
    listed = ", ".join(names.values()) or "none"
    return (f" Did you mean {names[close[0]]!r}?" if close else "") + f" There is: {listed}."
