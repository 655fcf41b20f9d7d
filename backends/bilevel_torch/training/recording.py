"""Whether the training steps of the present context record a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_recording: ContextVar[bool] = ContextVar("whether training steps record a graph", default=True)


def recording() -> bool:
    """Return whether a step needs a graph: False while `bl.metagradient` only computes the values of a run.

    Pass it as ``create_graph`` of `torch.autograd.grad` inside a step.
    """
    return _recording.get()


@contextmanager
def without_graph() -> Iterator[None]:
    """Compute only the values of steps in this context."""
    before = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(before)
