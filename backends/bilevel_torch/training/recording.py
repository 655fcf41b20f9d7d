"""Whether the training steps of the present context record a graph."""

from contextvars import ContextVar

recording: ContextVar[bool] = ContextVar("whether training steps record a graph", default=False)
"""True: the outputs of a `TrainingStep` carry a graph to its inputs. False: it computes only values."""
