"""Errors that name the ranks that have died, waited elsewhere or raised an error."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bilevel.messages import listed

PATIENCE = 10.0  # seconds, for the ranks that still compute
KEY = "bilevel/error"
OF_COLLECTIVES = ("/gloo/", "pair closure", "Connection closed by peer")  # gloo raises RuntimeErrors


@contextmanager
def named_ranks(label: str, group: Any, groups: Iterable[Any]) -> Iterator[None]:
    """Let an error of a collective in this block name the ranks that it is about.

    A rank that raises an error leaves a note in the store of the group. If a collective fails on a rank, the rank also
    makes the other ranks stop waiting for it, and reads their notes. A rank without a note has died, or it is stuck.
    All ranks raise an error, at the latest `PATIENCE` after the timeout of the group.

    Args:
        label: the start of the message.
        group: the process group, whose ranks are in the message.
        groups: the groups whose collectives may run in the block.

    Raises:
        RuntimeError: in place of the error of a collective. Other errors are raised as they are.
    """
    try:
        yield
    except Exception as error:
        store, ranks = _store(group), dist.get_process_group_ranks(group)
        if store is None or len(ranks) == 1:
            raise
        if not _is_of_collective(error):
            with suppress(RuntimeError):
                _note(store, dist.get_rank(), f"{type(error).__name__}: {error}")
            raise
        for one in groups:
            _stop_others(one)
        raise RuntimeError(f"{label}: {_cause(store, ranks)} Start the ranks again.") from error


def odd_ranks(numbers: Sequence[float], group: Any) -> list[int]:
    """Return the ranks whose number is another than most have. A nan is no other number."""
    known = Counter(number for number in numbers if number == number)
    usual = known.most_common(1)[0][0] if known else 0.0
    ranks = dist.get_process_group_ranks(group)
    return [rank for rank, number in zip(ranks, numbers, strict=True) if number == number and number != usual]


def named(ranks: Iterable[int]) -> str:
    """Return the names of some ranks: "rank 1 and rank 3"."""
    return listed(f"rank {rank}" for rank in ranks)


def _or_default(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


def _store(group: Any) -> Any:
    try:
        return _or_default(group).get_group_store()
    except (AttributeError, RuntimeError):  # an older PyTorch, or a group without a store
        return None


def _is_of_collective(error: Exception) -> bool:
    texts = OF_COLLECTIVES if isinstance(error, RuntimeError) else ()
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)


def _note(store: Any, rank: int, text: str) -> int:
    """Leave a note, and return its number. All ranks leave equally many until one raises an error alone."""
    number = store.add(f"{KEY}/{rank}", 1)
    store.set(f"{KEY}/{number}/{rank}", text)
    return number


def _stop_others(group: Any) -> None:
    """End the waiting of other ranks for this one: gloo closes all connections of a rank after a timeout."""
    group = _or_default(group)
    for rank in range(group.size()):
        if rank != group.rank():
            with suppress(RuntimeError):
                group.recv([torch.zeros(1)], rank, 0).wait(timedelta(milliseconds=1))


def _cause(store: Any, ranks: Sequence[int]) -> str:
    """Return what the notes of the ranks say. The first rank decides, so that all ranks raise the same error."""
    try:
        number = _note(store, dist.get_rank(), "")
        text = _notes_as_text(store, f"{KEY}/{number}", ranks)
        with suppress(RuntimeError):
            text = store.compare_set(f"{KEY}/{number}/cause", "", text).decode()
        return text
    except RuntimeError:
        return f"the store of the process group has ended. Unless torchrun hosts it, {named(ranks[:1])} has died."


def _notes_as_text(store: Any, key: str, ranks: Sequence[int]) -> str:
    patience = min(PATIENCE, store.timeout.total_seconds())
    notes, end = {}, time.monotonic() + patience
    while len(notes) < len(ranks) and not any(notes.values()):
        for rank in ranks:
            if rank not in notes and store.check([f"{key}/{rank}"]):
                notes[rank] = store.get(f"{key}/{rank}").decode()
        if time.monotonic() > end:
            missing = named(rank for rank in ranks if rank not in notes)
            return f"no answer from {missing} in {patience:g} s. It has died, or it is stuck. See its output."
        time.sleep(0.02)
    if raised := {rank: note for rank, note in notes.items() if note}:
        return " ".join(f"rank {rank} has raised {note.rstrip('.')}." for rank, note in raised.items())
    return "a collective has failed, but all ranks answer. They may have made different calls."
