"""One step of the hyperparameters every few steps of a trainer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from bilevel.results import Hypergradient
from bilevel_torch.first_order import FirstOrder
from bilevel_torch.first_order.adaptation import ADAPTIVE
from bilevel_torch.first_order.evaluation import Loss

Outer = Callable[[Any], torch.Tensor]  # from a batch to F


class OuterStep:
    """Hypergradients by `FirstOrder`, an optimizer of the hyperparameters, and batches for F, with one state.

    If an optimizer of the Adam family trains the module, it is the preconditioner.

    Args:
        hparams: leaf tensors that require gradients.
        optimizer: their optimizer.
        batches: the batches for F, which are read again and again.
        every: the number of training steps between two steps of hparams, >= 1.

    Raises:
        TypeError, ValueError: for an optimizer that is none, or that does not have all of hparams.
    """

    def __init__(
        self, hparams: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, batches: Iterable[Any], every: int
    ) -> None:
        _check_optimizer(optimizer, hparams)
        self._every = every
        self._hparams, self._optimizer, self._batches = hparams, optimizer, Repeated(batches)
        self._first_order: FirstOrder | None = None
        self._trained: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None  # of the FirstOrder
        self._loaded: dict[str, Any] | None = None  # until the first step makes a FirstOrder

    def due(self, step: int) -> bool:
        """Tell whether hparams take a step after so many training steps."""
        return step % self._every == 0

    def __call__(
        self, module: torch.nn.Module, trained_by: torch.optim.Optimizer, inner: list[Loss], outer: Outer
    ) -> Hypergradient[Any, Any]:
        """Take a step of hparams. ``inner`` has a function for each micro-batch, whose mean is L."""
        if self._first_order is None or self._trained != (module, trained_by):  # another run has another optimizer
            self._first_order, self._trained = self._made(module, trained_by), (module, trained_by)
        batch = next(self._batches)
        hg = self._first_order.backward(inner, lambda: outer(batch), accumulate=False)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return hg

    def _made(self, module: torch.nn.Module, trained_by: torch.optim.Optimizer) -> FirstOrder:
        preconditioner = trained_by if isinstance(trained_by, ADAPTIVE) else None
        if self._first_order is not None:
            self._loaded = self._first_order.state_dict()
        made = FirstOrder(module, self._hparams, preconditioner=preconditioner)
        if self._loaded is not None:
            made.load_state_dict(self._loaded)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the three parts."""
        first_order = self._loaded if self._first_order is None else self._first_order.state_dict()
        return {
            "first_order": first_order,
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._loaded = state_dict["first_order"]
        if self._first_order is not None and self._loaded is not None:
            self._first_order.load_state_dict(self._loaded)
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._batches.load_state_dict(state_dict["batches"])


def _check_optimizer(optimizer: Any, hparams: Sequence[torch.Tensor]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"The optimizer of the hyperparameters: expected an optimizer of torch.optim, got {got}.")
    if not ids(hparams) <= ids(parameters(optimizer)):
        raise ValueError(
            "The optimizer of the hyperparameters does not have all of them. Construct it with these tensors, such as "
            "torch.optim.Adam(weights.parameters(), 0.1)."
        )


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors that an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def ids(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return the ids of tensors, since ``==`` compares their entries."""
    return {id(t) for t in tensors}


class Repeated:
    """The batches of a loader, again and again. Its state is a position, and the loader's generator if it has one."""

    def __init__(self, loader: Iterable[Any]) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"batches: expected a loader of batches for the outer loss, got {type(loader).__name__}.")
        self._loader = loader
        self._pass: Iterator[Any] = iter(())
        self._position = 0
        self._generator: Any = getattr(loader, "generator", None)
        self._start: torch.Tensor | None = None  # the state of the generator at the start of the pass

    def __next__(self) -> Any:
        batch = next(self._pass, self)  # the object itself marks the end
        if batch is self:
            self._begin()
            batch = next(self._pass, self)
        if batch is self:
            raise ValueError("batches: the loader of batches for the outer loss is empty, or can be read only once.")
        self._position += 1
        return batch

    def _begin(self) -> None:
        self._start = None if self._generator is None else self._generator.get_state()
        self._pass, self._position = iter(self._loader), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position in this pass, and the state of the generator at its start."""
        return {"position": self._position, "generator": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the loader to the position of `state_dict`."""
        if self._generator is not None and state_dict["generator"] is not None:
            self._generator.set_state(state_dict["generator"])
        if state_dict["position"]:
            self._begin()
        for _ in range(state_dict["position"]):
            next(self)
