"""A training run as a problem, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.messages import counted


@dataclass(frozen=True)
class Training:
    """Minimize ``outer(state, λ)`` over λ, where ``state`` is the end of a training run with hyperparameters λ.

    The run is ``state ← step(state, λ, batch)``, one batch after the other. `bl.metagradient` differentiates it. The
    derivative is exact at any distance from a minimum (Maclaurin, Duvenaud & Adams, ICML 2015; Engstrom et al.,
    "Optimizing ML training with metagradient descent", arXiv 2503.13751).

    ``step`` must be a function of its arguments, since parts of the run are computed twice. In torch, random numbers
    from the global generators are drawn again with the same values. In JAX, put the key into the state or the batch.

    Args:
        step: (state, hparams, batch) -> the next state, with the same structure, shapes and dtypes. A state is any
            tree: weights, the optimizer's state, a step number, buffers, a key. Derivatives flow through the
                floating-point arrays.
            In torch and JAX, `bilevel_torch.TrainingStep` and `bilevel_jax.TrainingStep` make a step from a loss and
            an optimizer. For the numpy backend, an object with the methods ``vjp_params(state, hparams, v, batch)`` and
            ``vjp_hparams(...)``, as for a `bl.FixedPoint`. In JAX, equal steps are compiled once.
        outer: F: (state, hparams, *outer_args) -> scalar. For an average of weights, keep the average in the state.
        at: numbers of steps. F then takes the list of the states after so many steps, in place of the last state.

    Raises:
        TypeError: if ``step`` or ``outer`` cannot be called, or ``at`` holds no integers.
        ValueError: if ``at`` is empty or does not increase.
    """

    step: Callable[..., Any]
    outer: Callable[..., object]
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        forms = {"step": "(state, hparams, batch) -> state", "outer": "(state, hparams, *outer_args) -> scalar"}
        for role, form in forms.items():
            if not callable(getattr(self, role)):
                got = type(getattr(self, role)).__name__
                raise TypeError(f"Training.{role}: expected a function {form}, got {got}.")
        if self.at is None:
            return
        if not isinstance(self.at, Iterable):
            raise TypeError(f"Training.at: expected numbers of steps, as in (10, 20), got {self.at!r}.")
        object.__setattr__(self, "at", tuple(self.at))
        if not all(type(t) is int for t in self.at):
            raise TypeError(f"Training.at: expected numbers of steps, got {self.at!r}.")
        if not self.at or any(b <= a for a, b in zip((-1, *self.at), self.at, strict=False)):
            raise ValueError(f"Training.at: expected increasing numbers of steps >= 0, got {self.at!r}.")


def check_training(training: object) -> None:
    """Raise a TypeError unless this is a training."""
    if not isinstance(training, Training):
        raise TypeError(f"training: expected bl.Training(step, outer), got {type(training).__name__}.")


@dataclass(frozen=True)
class Batches:
    """The batches of a run: ``batches[t]`` is the batch of step t, counted from 0."""

    get: Callable[[int], Any]
    steps: int

    def __getitem__(self, t: int) -> Any:
        return self.get(t)


def as_batches(backend: Backend, batches: object, steps: int | None) -> Batches:
    """Return the batches of a run with a number of steps.

    Raises:
        TypeError: for anything but a sequence, a function of the step number, or None.
        ValueError: for an empty sequence, or if the number of steps is missing or less than 1.
    """
    if steps is not None and type(steps) is not int:
        raise TypeError(f"steps: expected an integer, got {steps!r}.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps}.")
    get: Callable[[int], Any]
    if batches is None or (callable(batches) and not hasattr(batches, "__getitem__")):
        if steps is None:
            given = "Without batches" if batches is None else "With a function as batches"
            raise ValueError(f"steps is missing. {given}, pass the number of steps: steps=100.")
        get = batches if callable(batches) else lambda _: None
    else:
        items = _sequence(backend, batches)
        steps = len(items) if steps is None else steps
        get = lambda t: items[t % len(items)]  # noqa: E731
    return Batches(get, steps)


def _sequence(backend: Backend, batches: Any) -> Sequence[Any]:
    if backend.owns(batches) or isinstance(batches, np.ndarray | tuple | dict | str):
        kind = f"a {type(batches).__name__}" if isinstance(batches, tuple | dict | str) else "an array"
        raise TypeError(
            f"batches: expected a list with one batch for each step, or a function of the step number, got {kind}. If "
            "each step takes the same batch, write [batch] and steps=."
        )
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(
            f"batches: expected a list with one batch for each step, or a function of the step number, got "
            f"{type(batches).__name__}. Parts of a run are computed again, so a batch must be found by its number. "
            "Write list(loader), or bilevel_torch.replay(loader) for a torch DataLoader."
        )
    if not len(batches):
        raise ValueError("batches is empty. If the step takes no batch, leave batches out and pass steps=.")
    return batches


def check_observed(training: Training, steps: int) -> None:
    """Raise a ValueError if ``at`` lies beyond the end of the run."""
    if training.at is not None and training.at[-1] > steps:
        raise ValueError(f"Training.at: got {training.at[-1]}, but the run has {counted(steps, 'step')}.")
