"""Check that a step and its batches can be computed again."""

from __future__ import annotations

from typing import Any

from bilevel.backend import Backend
from bilevel.metagradients.training import Batches
from bilevel.steps import Steps, floats_of

SAME = 0.01  # of the length of the step: sums on a GPU may differ in their rounding


def check_repeatable(backend: Backend, steps: Steps, state: Any, hparams: Any, batches: Batches, random: Any) -> None:
    """Compute the first batch twice, and the first step of an eager framework, from the same random states.

    Raises:
        ValueError: if two of them differ, so that the derivative would be wrong.
    """
    pair: list[Any] = []
    for _ in range(2):
        steps.set_random_state(random)
        pair.append(batches[0])
    if not all(map(_equal, *([leaf for _, leaf in backend.leaves(batch)] for batch in pair))):
        raise ValueError(
            "batches: the batch of step 0 differs when it is read again. Parts of a run are computed again, so the "
            "batch of a step must always be the same. Keep the batches in a list, or draw their random numbers from a "
            'generator that is seeded with the number of the step. Or store the whole graph: checkpoints="none".'
        )
    if backend.compiles:  # a traced step is a function of its arguments
        return
    space = backend.space(floats_of(backend, state))
    steps.set_random_state(random)
    first = space.scale(1.0, floats_of(backend, steps.advance(state, hparams, [pair[0]])))  # a copy: steps may write
    steps.set_random_state(random)
    again = floats_of(backend, steps.advance(state, hparams, [pair[0]]))
    measured = backend.run(_distances, floats_of(backend, state), first, again)
    moved, differ, size = map(backend.to_host, measured)
    if differ > SAME * moved + space.eps * size:
        raise ValueError(
            "step: its result differs when it is computed again with the same arguments. Parts of a run are computed "
            "again, so a step may depend only on its arguments and on the global random generators of torch. Put all "
            "values that a step changes into the state, and do not write to the batch. Or store the whole graph: "
            'checkpoints="none".'
        )


def _distances(backend: Backend, start: list[Any], first: list[Any], again: list[Any]) -> tuple[Any, Any, Any]:
    """Return the length of a step, the distance between its two results, and the norm of the first."""
    space = backend.space(first)
    return space.norm(space.axpy(-1.0, start, first)), space.norm(space.axpy(-1.0, again, first)), space.norm(first)


def _equal(a: Any, b: Any) -> bool:
    """Return whether two leaves are equal, as far as this is known."""
    if not (hasattr(a, "shape") and hasattr(b, "shape")):
        return a == b or not isinstance(a, int | float | str)
    return a is b or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))
