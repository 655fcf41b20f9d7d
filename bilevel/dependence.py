"""Warnings about arguments that the objectives do not use, and about params that are no arguments."""

import warnings
from collections.abc import Sequence

from bilevel.backend import Backend
from bilevel.convergence import callers_level
from bilevel.errors import DependenceWarning
from bilevel.linearization import Dependence

Labels = tuple[str, str, str]
EQUATION: Labels = "the step or residual", "the step or residual", "outer"
INTENDED = 'If this is intended, call warnings.simplefilter("ignore", bl.DependenceWarning).'


def warn_of_dependence(
    backend: Backend,
    params: object,
    hparams: object,
    outer: Dependence | None,
    inner: Dependence | None,
    labels: Labels = ("inner", "the gradient of inner by params", "outer"),
) -> None:
    """Warn about leaves without influence, which get a derivative of zero or no solution, and about forgotten params.

    Args:
        outer: on which leaves the outer objective depends. None: unknown.
        inner: on which leaves ∂L/∂w depends. None: unknown.
        labels: the names of the inner objective, of the map r and of the outer objective in the messages.
    """
    of_inner, of_map, of_outer = labels
    if outer is not None and not any(outer.params):
        _warn(
            f"{of_outer} does not depend on params, so the hypergradient is only its derivative by hparams. Are params "
            "and hparams in the right order?"
        )
    if inner is None:
        return
    used = [True] * len(inner.hparams) if outer is None else outer.hparams
    direct = [not i and o for i, o in zip(inner.hparams, used, strict=True)]
    nowhere = [not i and not o for i, o in zip(inner.hparams, used, strict=True)]
    way_out = (
        f"Compute {of_inner} with the hparams that are passed: a copy, a detached tensor, a number or a value that is "
        "closed over has no derivative."
    )
    if inner.others:
        shapes = ", ".join(map(str, inner.others[:5])) + (" and others" if len(inner.others) > 5 else "")
        _warn(
            f"{of_inner} depends on {len(inner.others)} trainable tensors that are neither in params nor in hparams, "
            f"of shapes {shapes}. They count as constants. Add them to params if the inner training changes them. "
            "Otherwise freeze them by requires_grad_(False)."
        )
    if any(direct):
        rest = "its derivative is zero" if outer is None else f"its hypergradient comes only from {of_outer}"
        _warn(
            f"{_names(backend, 'hparams', hparams, direct)} has no influence on the minimum, because {of_map} "
            f"does not depend on it: {rest}. {way_out}"
        )
    if any(nowhere):
        names = _names(backend, "hparams", hparams, nowhere)
        _warn(f"Neither {of_outer} nor {of_map} depends on {names}: its hypergradient is zero. {way_out}")
    felt = [True] * len(inner.params) if outer is None else outer.params
    flat = [not i and o for i, o in zip(inner.params, felt, strict=True)]
    if any(flat):
        _warn(
            f"{of_inner} does not depend on {_names(backend, 'params', params, flat)}, or is linear in it. So it has "
            "no minimum there, and the Hessian is singular. Leave it out of params, or add a penalty on it."
        )


def _warn(text: str) -> None:
    """Warn at the user's line, with the way to say that it is intended."""
    warnings.warn(DependenceWarning(f"{text} {INTENDED}"), stacklevel=callers_level())


def _names(backend: Backend, name: str, tree: object, marked: Sequence[bool]) -> str:
    paths = [name + path for (path, _), mark in zip(backend.leaves(tree), marked, strict=True) if mark]
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
