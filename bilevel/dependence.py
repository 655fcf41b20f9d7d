"""Warnings about arguments that the objectives do not use, and about params that are no arguments."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from bilevel.backend import Backend
from bilevel.errors import DependenceWarning
from bilevel.linearization import Dependence
from bilevel.messages import callers_level, counted, listed

MOST_NAMES = 5  # in a message
INTENDED = 'If this is intended, call warnings.simplefilter("ignore", bl.DependenceWarning).'


class Names(NamedTuple):
    """The names in messages of the inner objective, of the map r, and of the outer objective."""

    inner: str
    residual: str
    outer: str


MINIMUM = Names("inner", "the gradient of inner by params", "outer")
EQUATION = Names("the step or residual", "the step or residual", "outer")


def warn_of_dependence(
    backend: Backend,
    params: object,
    hparams: object,
    of_outer: Dependence | None,
    of_inner: Dependence | None,
    names: Names = MINIMUM,
) -> None:
    """Warn about arguments that the objectives do not use, and about trainable arrays that are no arguments.

    Args:
        params, hparams: the trees whose leaves the messages name.
        of_outer: the leaves that the outer objective depends on. None: unknown.
        of_inner: the leaves of params that the inner objective depends on, and the leaves of hparams that r depends
            on. None: unknown.
        names: the names of the functions.
    """
    if of_outer is not None and not any(of_outer.params):
        warn(
            f"{names.outer} does not depend on params, so the hypergradient is only its derivative by hparams. Are "
            "params and hparams in the right order?"
        )
    if of_inner is None:
        return
    if of_inner.others:
        warn(
            f"{names.inner} depends on {counted(len(of_inner.others), 'trainable tensor')} outside of params and "
            f"hparams, of shapes {listed(of_inner.others, MOST_NAMES)}. They count as constants. Add them to params if "
            "the inner training changes them. Otherwise freeze them by requires_grad_(False)."
        )
    every = Dependence([True] * len(of_inner.params), [True] * len(of_inner.hparams))
    seen_by_outer = every if of_outer is None else of_outer
    hparams_flags = list(zip(of_inner.hparams, seen_by_outer.hparams, strict=True))
    params_flags = zip(of_inner.params, seen_by_outer.params, strict=True)
    only_outer = _paths(backend, "hparams", hparams, [outer and not inner for inner, outer in hparams_flags])
    nowhere = _paths(backend, "hparams", hparams, [not outer and not inner for inner, outer in hparams_flags])
    no_minimum = _paths(backend, "params", params, [outer and not inner for inner, outer in params_flags])
    way_out = (
        f"Compute {names.inner} with the hparams that are passed: a copy, a detached tensor, a number or a value that "
        "is closed over has no derivative."
    )
    if only_outer:
        has, them, their = ("has", "it", "its") if len(only_outer) == 1 else ("have", "them", "their")
        rest = "derivative is zero" if of_outer is None else f"hypergradient comes only from {names.outer}"
        warn(
            f"{listed(only_outer, MOST_NAMES)} {has} no influence on the minimum, because {names.residual} does not "
            f"depend on {them}: {their} {rest}. {way_out}"
        )
    if nowhere:
        their = "its" if len(nowhere) == 1 else "their"
        warn(
            f"Neither {names.outer} nor {names.residual} depends on {listed(nowhere, MOST_NAMES)}: {their} "
            f"hypergradient is zero. {way_out}"
        )
    if no_minimum:
        them = "it" if len(no_minimum) == 1 else "them"
        warn(
            f"{names.inner} does not depend on {listed(no_minimum, MOST_NAMES)}, or is linear in {them}. So it has no "
            f"minimum there, and the Hessian is singular. Leave {them} out of params, or add a penalty on {them}."
        )


def warn(text: str) -> None:
    """Warn at the user's line, with the way to say that it is intended."""
    warnings.warn(DependenceWarning(f"{text} {INTENDED}"), stacklevel=callers_level())


def _paths(backend: Backend, name: str, tree: object, marks: Sequence[bool]) -> list[str]:
    """Return the paths of the marked leaves."""
    return [name + path for (path, _), mark in zip(backend.leaves(tree), marks, strict=True) if mark]


def warn_of_cut() -> None:
    """Warn that a state does not depend on the state before it."""
    warn(
        "step: the next state does not depend on the arrays of the state before, so the derivative ends at this step. "
        "Do not detach or copy them, and do not apply stop_gradient."
    )
