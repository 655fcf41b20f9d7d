"""Which states of a run to store, and which parts of the run to compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, comb, isqrt, log2
from typing import Literal, NamedTuple

from bilevel.options import check_choice

Checkpoints = Literal["auto", "none", "all", "sqrt", "log"] | int
BUDGET = 2**31  # bytes, for "auto"


class Action(NamedTuple):
    """A part of the work on a run in segments.

    Attributes:
        kind: "load" the state before a segment, "advance" to it, "save" or "drop" this state, or "pull" an adjoint back
            through this segment.
        segment: the number of the segment.
    """

    kind: Literal["load", "advance", "save", "drop", "pull"]
    segment: int


def actions(end: int, held: Iterable[int], slots: int) -> Iterator[Action]:
    """Yield the actions that pull an adjoint back from the end of segment ``end`` − 1 to the start of the run.

    The number of segments to advance is the least possible (Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26,
    2000).

    Args:
        end: the number of segments that are still to be pulled back.
        held: the segments whose first states are stored, with 0. After a kill, a state after the end may be among them.
        slots: the largest number of stored states, >= 1.
    """
    stack = [k for k in sorted(held) if k < end]
    while end > 0:
        at = stack[-1]
        yield Action("load", at)
        while at < end - 1:
            free = slots - len(stack)
            stop = at + _stride(end - at, free + 1)
            yield from (Action("advance", k) for k in range(at + 1, stop + 1))
            at = stop
            if free and at < end - 1:
                stack.append(at)
                yield Action("save", at)
        yield Action("pull", end - 1)
        if stack[-1] == end - 1:
            yield Action("drop", stack.pop())
        end -= 1


def _stride(length: int, slots: int) -> int:
    """Return how far to advance before the next state is stored. The first state takes one of the slots."""
    if slots == 1:
        return length - 1
    sweeps = 1
    while comb(slots + sweeps, slots) < length:
        sweeps += 1
    return min(comb(slots + sweeps - 1, slots), length - comb(slots + sweeps - 2, slots - 1))


def advanced(segments: int, slots: int) -> int:
    """Return the number of segments that `actions` advances for a whole run.

    This is the closed form of Griewank & Walther (2000), eq. 2.
    """
    if slots >= segments:
        return segments - 1
    sweeps = 1
    while comb(slots + sweeps, slots) < segments:
        sweeps += 1
    return sweeps * segments - comb(slots + sweeps, slots + 1)


@dataclass(frozen=True)
class Plan:
    """How a run is divided.

    Attributes:
        bounds: the numbers of steps at which segments begin and end, from 0 to the number of steps. The graph of one
            segment at a time is in memory.
        slots: the number of stored states.
    """

    bounds: tuple[int, ...]
    slots: int

    @property
    def segments(self) -> int:
        """The number of segments."""
        return len(self.bounds) - 1


def make_plan(
    checkpoints: Checkpoints,
    block: int | None,
    steps: int,
    observed: Sequence[int],
    cost: Callable[[], tuple[int, int]],
    memory: int | None,
) -> Plan:
    """Return the plan of a run.

    Args:
        checkpoints, block, memory: options of `bl.metagradient`.
        steps: T, the number of steps.
        observed: numbers of steps that must be bounds.
        cost: returns the bytes of one state and of the graph of one step.

    Raises:
        TypeError, ValueError: for options out of range, or a memory that is too small.
    """
    _check(checkpoints, block, memory)
    if checkpoints == "auto" and block is None:
        block, slots = _within(memory or BUDGET, steps, *cost())
    else:
        root, digits = isqrt(steps - 1) + 1, max(1, ceil(log2(steps)))
        sizes = {"auto": root, "none": steps, "all": 1, "sqrt": root, "log": digits}
        block = block or sizes.get(str(checkpoints), digits)
        counts = {"none": 1, "log": digits} | ({} if isinstance(checkpoints, str) else {str(checkpoints): checkpoints})
        slots = counts.get(str(checkpoints), steps)
    bounds = tuple(sorted({*range(0, steps, block), *observed, 0, steps}))
    return Plan(bounds, min(slots, len(bounds) - 1))


def _within(memory: int, steps: int, state: int, graph: int) -> tuple[int, int]:
    """Return the length of a segment and the number of stored states with the least work within a memory."""
    if steps * graph <= memory:
        return steps, 1
    best: tuple[int, int, int] | None = None
    for block in {2**i for i in range(steps.bit_length())}:
        left = memory - block * graph
        slots = left // state if state else steps
        if left < 0 or slots < 2 or (block > 1 and block * graph > memory // 2):
            continue
        segments = ceil(steps / block)
        slots = min(slots, segments)
        best = min(filter(None, [best, (advanced(segments, slots) * block, block, slots)]))
    if best is None:
        raise ValueError(
            f"memory: {memory:,} bytes are too few. The graph of one step takes about {graph:,} bytes, and a state "
            f"takes {state:,} bytes. Pass at least {graph + 2 * state:,}, or store the states in a directory by store=."
        )
    return best[1], best[2]


def _check(checkpoints: Checkpoints, block: int | None, memory: int | None) -> None:
    if type(checkpoints) is int:
        if checkpoints < 1:
            raise ValueError(f"checkpoints: expected a number of states >= 1, got {checkpoints}.")
    elif isinstance(checkpoints, str):
        check_choice("checkpoints", checkpoints, ("auto", "none", "all", "sqrt", "log"))
    else:
        raise TypeError(
            f'checkpoints: expected "auto", "none", "all", "sqrt", "log" or a number of states, got {checkpoints!r}.'
        )
    for name, value in (("block", block), ("memory", memory)):
        if value is not None and type(value) is not int:
            raise TypeError(f"{name}: expected an integer, got {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}.")
    if memory is not None and (checkpoints != "auto" or block is not None):
        raise ValueError('memory: only checkpoints="auto" without a block has a budget. Leave one of them out.')
