"""Values of a training run, without derivatives."""

from itertools import pairwise
from typing import Any

from bilevel.backend import Backend
from bilevel.metagradients.outer import Outer, outer_derivatives
from bilevel.metagradients.training import Batches, Training
from bilevel.spaces.array import Args


def retrain(
    backend: Backend, training: Training, state: Any, hparams: Any, batches: Batches, outer_args: Args, block: int
) -> tuple[Any, Outer]:
    """Return the last state of a run, and F with its derivatives there. ``block`` steps are computed at a time."""
    steps, at = backend.steps(training.step), training.at or (batches.steps,)
    bounds = sorted({*range(0, batches.steps, block), *at, batches.steps})
    states = {0: steps.start(state)}
    for t, stop in pairwise(bounds):
        states[stop] = steps.advance(states[t], hparams, [batches[i] for i in range(t, stop)])
        if t not in at:
            del states[t]
    outer = outer_derivatives(
        backend, training.outer, [states[t] for t in at], hparams, outer_args, training.at is not None
    )
    return states[batches.steps], outer
