"""Evaluate objectives at other points, in float64 if possible."""

from collections.abc import Callable
from typing import TypeVar

from bilevel.backend import Backend
from bilevel.linearization import Inputs
from bilevel.spaces.array import H, P

T = TypeVar("T")


def in_best_precision(
    backend: Backend, inputs: Inputs[P, H], evaluate: Callable[[Callable[[P, H], Inputs[P, H]]], T]
) -> tuple[T | None, str]:
    """Return evaluate(at) and the first error of the objectives, "" if there was none.

    ``at`` is the function that `Backend.isolated` yields, in float64. If an error occurs, it is in the dtype of the
    inputs. The result is None if there is an error again.
    """
    obstacle = ""
    for double in (True, False):
        try:
            with backend.isolated(inputs, double) as at:
                return evaluate(at), obstacle
        except Exception as error:  # any error of the objectives for other arrays
            obstacle = obstacle or f"{type(error).__name__}: {error}"
    return None, obstacle
