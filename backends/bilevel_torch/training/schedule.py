"""The numeric options that a scheduler gives an optimizer, step by step."""

import copy
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel_torch.training.groups import numbers_of
from bilevel_torch.training.rules import Options


class Schedule:
    """The options of each step, from copies of a scheduler that is stepped once after each step.

    The first step has the present options of the optimizer. The user's scheduler never moves.

    Raises:
        TypeError: for a scheduler that needs a metric, or an object that is none.
        ValueError: if the scheduler belongs to another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "scheduler: ReduceLROnPlateau needs a metric in each step, and the metric's influence on the rate has "
                "no derivative. Use a scheduler of step numbers, such as CosineAnnealingLR."
            )
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"scheduler: expected one of torch.optim.lr_scheduler, got {type(scheduler).__name__}. Join several by "
                "SequentialLR or ChainedScheduler."
            )
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("scheduler: it belongs to another optimizer. Construct it with the optimizer given here.")
        self._first = None if scheduler is None else _copied(scheduler)
        self._running = None if scheduler is None else _copied(scheduler)
        self._steps = [numbers_of(optimizer)]

    def at(self, step: int) -> list[Options]:
        """Return the numeric options of each group at a step."""
        if self._running is None:
            return self._steps[0]
        while len(self._steps) <= step:
            _step(self._running)
            last, now = self._steps[-1], numbers_of(self._running.optimizer)
            self._steps.append(last if now == last else now)  # most schedules are constant at the end
        return self._steps[step]

    def is_at(self, step: int, scheduler: LRScheduler) -> bool:
        """Return whether a scheduler has made some steps since the construction."""
        expected = self.state_dict(step) or {}
        return expected.get("last_epoch") == scheduler.state_dict().get("last_epoch")

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return the scheduler's state after some steps. None: there is no scheduler."""
        if self._first is None:
            return None
        scheduler = _copied(self._first)
        for _ in range(step):
            _step(scheduler)
        return scheduler.state_dict()


def _copied(scheduler: LRScheduler) -> LRScheduler:
    """Return a copy of a scheduler, with a copy of its optimizer that has no weights and no state."""
    optimizer = scheduler.optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(torch.empty(0)) for p in params}
    return copy.deepcopy(scheduler, {**memo, id(optimizer.state): {}})


def _step(scheduler: LRScheduler) -> None:
    with warnings.catch_warnings():
        # The copy of the optimizer makes no steps, and a scheduler warns of that.
        warnings.filterwarnings("ignore", message=r".*optimizer\.step\(\)")
        scheduler.step()
