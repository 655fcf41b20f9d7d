"""Training steps with analytic derivatives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.backend import Backend, stacked
from bilevel.spaces.tree import leaves, with_leaves
from bilevel.steps import Pull, Pulled, Steps
from bilevel.validation import check_dtypes, check_like


class NumpySteps(Steps):
    """Steps of an object with the methods ``vjp_params(state, hparams, v, batch)`` and ``vjp_hparams(...)``."""

    def __init__(self, backend: Backend, step: Any) -> None:
        self.backend = backend
        self.step = step

    @override
    def advance(self, state: Any, hparams: Any, batches: Sequence[Any]) -> Any:
        return self._states(state, hparams, batches)[-1]

    def _states(self, state: Any, hparams: Any, batches: Sequence[Any]) -> list[Any]:
        states = [state]
        for batch in batches:
            after = self.step(states[-1], hparams, batch)
            check_like(self.backend, "step", after, "state", state)
            check_dtypes(self.backend, "step", after, "state", state)
            states.append(after)
        return states

    @override
    def record(self, state: Any, hparams: Any, batches: Sequence[Any]) -> tuple[Any, Pull]:
        states = self._states(state, hparams, batches)

        def pull(cotangent: list[Any], many: bool) -> Pulled:
            if many:
                rows = [one(list(row)) for row in zip(*cotangent, strict=True)]
                return stacked(self.backend, rows)
            return one(cotangent)

        def one(cotangent: list[Any]) -> Pulled:
            v, total = with_leaves(state, cotangent), [None] * len(leaves(hparams))
            for before, batch in reversed(list(zip(states, batches, strict=False))):
                cross = self.step.vjp_hparams(before, hparams, v, batch)
                if cross is not None:
                    check_like(self.backend, "the step's vjp_hparams", cross, "hparams", hparams)
                    total = [c if t is None else t + c for t, c in zip(total, leaves(cross), strict=True)]
                v = self.step.vjp_params(before, hparams, v, batch)
                check_like(self.backend, "the step's vjp_params", v, "state", state)
            return Pulled([np.asarray(a, b.dtype) for a, b in zip(leaves(v), leaves(state), strict=True)], total)

        return states[-1], pull

    @override
    def graph_bytes(self, state: Any, hparams: Any, batch: Any) -> int:
        return sum(leaf.nbytes for leaf in leaves(state))
