"""The result of a metagradient."""

from typing import Any, Generic, NamedTuple

import numpy as np

from bilevel.spaces.array import H, P


class MetagradientInfo(NamedTuple):
    """Information about a differentiated run.

    Attributes:
        steps: the number of steps of the run.
        computed: the number of steps that were computed, with a graph or without. It exceeds ``steps`` if parts of the
            run were computed again.
        bounds: the numbers of steps at which the segments of the run begin and end. The graph of one segment at a time
            was in memory.
        stored: the largest number of states that were stored at one time.
        norms: norms of dF/dw at these bounds, a NumPy array, where w are the leaves of the state that F depends on.
            Over all queries, if there are several.
        finite: whether all numbers of the result are finite.
    """

    steps: int
    computed: int
    bounds: tuple[int, ...]
    stored: int
    norms: np.ndarray
    finite: bool

    @property
    def growth(self) -> float:
        """The largest of these norms, relative to the last one that is not zero.

        If it is large, the run magnifies small changes.
        """
        known = self.norms[self.norms != 0]
        return float(known.max() / known[-1]) if known.size else 1.0


class Metagradient(NamedTuple, Generic[P, H]):
    """dF/dλ of a training run.

    Attributes:
        grad: dF/dλ, with the structure, shapes and dtypes of ``hparams``.
        value: F, a scalar of the framework.
        state: the last state of the run.
        state_grad: dF/d(first state), the derivative by the initial weights and the rest of the first state. None in
            place of leaves that are no floating-point arrays.
        info: `MetagradientInfo`.
    """

    grad: H
    value: Any
    state: P
    state_grad: P
    info: MetagradientInfo
