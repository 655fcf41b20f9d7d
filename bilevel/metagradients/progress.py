"""A count of steps, and a bar with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """The number of steps that were computed, and perhaps a bar of tqdm.

    Attributes:
        done: the number of steps.
    """

    def __init__(self, shown: Any = None) -> None:
        self.done = 0
        self._shown = shown

    def expect(self, total: int) -> None:
        """Set the number of steps that will be computed."""
        if self._shown is not None:
            self._shown.reset(total)

    def add(self, steps: int) -> None:
        """Count steps."""
        self.done += steps
        if self._shown is not None:
            self._shown.update(steps)


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    """Yield a count of steps, with a bar if ``show``.

    Raises:
        ModuleNotFoundError: if a bar is wanted and tqdm is not installed.
    """
    if not show:
        yield Bar()
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs the package tqdm, which is not installed: pip install tqdm. Or leave progress out.",
            name="tqdm",
        ) from error
    with tqdm(unit="step", desc="metagradient") as shown:
        yield Bar(shown)
