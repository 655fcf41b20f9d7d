"""A training run in segments: its states forwards, and a cotangent backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.backend import Backend
from bilevel.metagradients.schedule import Action, Plan, actions
from bilevel.metagradients.snapshots import OBSERVED, STORED, Snapshots
from bilevel.metagradients.training import Batches
from bilevel.steps import Pulled, Steps


@dataclass(frozen=True)
class Run:
    """A training run from one first state, with one λ.

    The segments have the numbers from 0 to n − 1. State k is the state before segment k. State n is the end of the run.

    Attributes:
        backend: the framework.
        steps: the steps of the framework.
        first: the first state.
        hparams: λ.
        batches: the batches.
        plan: the bounds of the segments, and the largest number of states to store for the backward pass.
        snapshots: the stored states. Each is stored with the state of the random generators.
        observed: the numbers k of the states to return: those that F needs, and then the end of the run.
        tell: called with the number of steps of each segment that is computed.
    """

    backend: Backend
    steps: Steps
    first: Any
    hparams: Any
    batches: Batches
    plan: Plan
    snapshots: Snapshots
    observed: Sequence[int]
    tell: Callable[[int], None]

    def todo(self, end: int) -> list[Action]:
        """Return the actions that pull a cotangent of state ``end`` back to the first state."""
        return list(actions(end, self.snapshots.numbers(STORED), self.plan.slots))

    def work(self, todo: Iterable[Action]) -> int:
        """Return the number of steps that some actions compute."""
        # To advance to state k is to compute segment k − 1. To pull is to compute the segment with its graph.
        moved = [a.segment - 1 if a.kind == "advance" else a.segment for a in todo if a.kind in ("advance", "pull")]
        return sum(self.plan.bounds[k + 1] - self.plan.bounds[k] for k in moved)

    def start(self) -> None:
        """Store the first state."""
        self._save(STORED, 0, self.first)
        self._observe(0, self.first)

    def forwards(self, todo: Iterator[Action]) -> Callable[[list[Any], bool], Pulled]:
        """Compute the run. Return the function that pulls a cotangent of its end back through the last segment.

        The actions up to and including the first pull are taken from ``todo``. The others are left for `backwards`.
        """
        state: Any = None
        for action in todo:
            if action.kind == "pull":
                break
            state = self._do(action, state)
        last = self.plan.segments - 1
        state, pull = self.steps.record(state, self.hparams, self._batches(last))
        self._observe(last + 1, state)
        self.tell(self._length(last))
        return pull

    def backwards(
        self, todo: Iterator[Action], pulled: Pulled, many: bool, keep: Callable[[int, Pulled, Pulled], Pulled]
    ) -> Pulled:
        """Pull cotangents back to the first state.

        Args:
            todo: the actions that are left.
            pulled: the cotangents of the state after the segment of the first pull, and of λ so far.
            many: whether the cotangents have a leading axis.
            keep: (k, the cotangents after segment k, the cotangents that came back through it) -> the cotangents before
                segment k, which go on. It adds the parts for λ, and ∂F/∂(state k).
        """
        state: Any = None
        for action in todo:
            if action.kind != "pull":
                state = self._do(action, state)
                continue
            k = action.segment
            found = self.steps.pull_back(state, self.hparams, self._batches(k), pulled.state, many)
            self.tell(self._length(k))
            pulled = keep(k, pulled, found)
        return pulled

    def observations(self) -> list[Any]:
        """Return the observed states. The last one is the end of the run, so its random states are restored."""
        return [self._load(OBSERVED, k) for k in self.observed]

    def _do(self, action: Action, state: Any) -> Any:
        kind, k = action
        if kind == "load":
            return self._load(STORED, k)
        if kind == "advance":
            state = self.steps.advance(state, self.hparams, self._batches(k - 1))
            self._observe(k, state)
            self.tell(self._length(k - 1))
        elif kind == "save":
            self._save(STORED, k, state)
        else:  # "drop"
            self.snapshots.drop(f"{STORED}-{k}")
        return state

    def _save(self, kind: str, k: int, state: Any) -> None:
        self.snapshots.save(f"{kind}-{k}", (state, self.steps.random_state()))

    def _load(self, kind: str, k: int) -> Any:
        like = lambda: (self.first, self.steps.random_state())  # noqa: E731
        state, random = self.snapshots.load(f"{kind}-{k}", like)
        self.steps.set_random_state(random)
        return state

    def _observe(self, k: int, state: Any) -> None:
        if k in self.observed and k not in self.snapshots.numbers(OBSERVED):
            self._save(OBSERVED, k, state)

    def _length(self, segment: int) -> int:
        return self.plan.bounds[segment + 1] - self.plan.bounds[segment]

    def _batches(self, segment: int) -> list[Any]:
        return [self.batches[t] for t in range(self.plan.bounds[segment], self.plan.bounds[segment + 1])]
