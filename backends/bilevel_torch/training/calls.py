"""Call a model with other weights and buffers, and find the new buffers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from bilevel_torch.training.statistics import differentiable_statistics

Tensors = dict[str, torch.Tensor]


class Caller(nn.Module):
    """A module around a model: `torch.func.functional_call` of it may call any method of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._tied = len(names) < len(every)  # finding tied weights takes time in each call
        self._inside = {name: f"model.{name}" for name in names}

    @override
    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)

    def call(
        self, params: Tensors, buffers: Tensors, function: Callable[..., Any], args: tuple[Any, ...], record: bool
    ) -> tuple[Any, Tensors]:
        """Return ``function(model, *args)`` for other weights and buffers, and the buffers afterwards.

        The given buffers do not change. With ``record``, the buffers afterwards carry their graph.

        Raises:
            TypeError: with ``record``, if a floating-point buffer changes without a graph.
        """
        copies = {name: _copied(buffer, record) for name, buffer in buffers.items()}
        nodes = {name: copy.grad_fn for name, copy in copies.items()}
        tensors = {self._inside[name]: tensor for name, tensor in {**params, **copies}.items()}
        with differentiable_statistics(self.model) if record and buffers else nullcontext():
            result = torch.func.functional_call(self, tensors, (function, *args), tie_weights=self._tied)
        after = {name: tensors[self._inside[name]] for name in buffers}
        if record:
            for name, buffer in after.items():
                # A layer without a graph leaves the node of the copy, or assigns a tensor that has none.
                lost = buffer.grad_fn is nodes[name] or not buffer.requires_grad
                if buffer.is_floating_point() and lost and not equal(buffers[name], buffer):
                    raise TypeError(self._without_graph(name))
        return result, after

    def _without_graph(self, name: str) -> str:
        path, _, short = name.rpartition(".")
        return (
            f"buffer {name!r}: {type(self.model.get_submodule(path)).__name__} changed it without a graph, for example "
            f"under torch.no_grad() or by detach(). So the run cannot be differentiated. Assign the new value with its "
            f"graph (self.{short} = ...): the training step cuts the graph itself. If the value does not depend on "
            "weights or hparams, store it in an attribute that is no buffer. A layer in evaluation mode keeps its "
            "buffers."
        )


def equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether two tensors have equal values, where nan equals nan."""
    return before.shape == after.shape and bool(((before == after) | (before.isnan() & after.isnan())).all())


@contextmanager
def modes(training: dict[nn.Module, bool]) -> Iterator[None]:
    """Set the training flags of modules in this context, and restore the flags afterwards."""
    before = {module: module.training for module in training}
    try:
        _set_modes(training)
        yield
    finally:
        _set_modes(before)


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the training flag of each module."""
    return {module: module.training for module in model.modules()}


def _set_modes(training: dict[nn.Module, bool]) -> None:
    for module, flag in training.items():
        if module.training != flag:  # to assign an attribute of a module takes longer than to read it
            module.training = flag


def _copied(buffer: torch.Tensor, record: bool) -> torch.Tensor:
    """Return a copy that the forward pass may change. With ``record``, a change leaves a trace in its graph."""
    if not record:
        return buffer.detach().clone()
    if buffer.is_floating_point() and not buffer.requires_grad:
        buffer = buffer.detach().requires_grad_()
    return buffer.clone()
