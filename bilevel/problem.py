"""A bilevel problem is a pair of functions; nothing to inherit from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Minimize ``outer(w*, λ)`` over λ, where ``w*`` minimizes ``inner(w, λ)`` over w.

    Both are called as ``f(params, hparams, *args)`` and return a scalar; ``args`` are the ``inner_args``
    and ``outer_args`` of the call, most often data. The torch and jax backends differentiate them. The
    numpy backend needs objects with analytic derivatives: see `bilevel.protocols.InnerProblem` and
    `bilevel.protocols.OuterObjective`, and `bilevel.problems` for ready ones.

    Problems of the same two functions are equal, so a problem may be built anew at each call.

    Raises:
        TypeError: if one of the two cannot be called.
    """

    inner: Callable[..., Any]
    outer: Callable[..., Any]

    def __post_init__(self) -> None:
        for role in ("inner", "outer"):
            if not callable(getattr(self, role)):
                raise TypeError(
                    f"Problem.{role}: expected a function of (params, hparams, *args) that returns a scalar, "
                    f"got {type(getattr(self, role)).__name__}."
                )
