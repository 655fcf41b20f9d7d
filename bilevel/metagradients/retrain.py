"""A training run without its derivative."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bilevel.backend import Backend
from bilevel.metagradients.outer import Outer, outer_derivatives
from bilevel.metagradients.training import Batches, Training
from bilevel.spaces.array import Args


def retrain(
    backend: Backend,
    training: Training,
    state: Any,
    hparams: Any,
    batches: Batches,
    outer_args: Args,
    bounds: Sequence[int],
) -> tuple[Any, Outer]:
    """Return the last state of a run, and F with its derivatives there. ``bounds``: see `Plan`."""
    steps, at = backend.steps(training.step), training.at or (batches.steps,)
    states = {0: steps.start(state)}
    for t, stop in pairwise(bounds):
        states[stop] = steps.advance(states[t], hparams, [batches[i] for i in range(t, stop)])
        if t not in at:
            del states[t]
    outer = outer_derivatives(
        backend, training.outer, [states[t] for t in at], hparams, outer_args, training.at is not None
    )
    return states[batches.steps], outer
