"""Gradients of a loss by the weights in a state, over micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bilevel_torch.training.calls import Caller, Tensors


def gradients(
    caller: Caller,
    params: Tensors,
    buffers: Tensors,
    loss: Callable[[Any, Any, Any], torch.Tensor],
    hparams: Any,
    batches: Sequence[Any],
    record: bool,
) -> tuple[Tensors, Tensors]:
    """Return the gradient of the mean loss of the batches, and the buffers after them. One backward pass per batch.

    A weight that no loss uses has no entry, as its ``.grad`` is None in a loop.
    """
    total: Tensors = {}
    for batch in batches:
        result, buffers = caller.call(params, buffers, loss, (hparams, batch), record)
        scaled = _checked(result) / len(batches) if len(batches) > 1 else _checked(result)
        grads = torch.autograd.grad(scaled, list(params.values()), create_graph=record, allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise TypeError(f"{name}: its gradient is sparse. Construct the embedding with sparse=False.")
            total[name] = total[name] + grad if name in total else grad
    if not total:
        raise ValueError(
            "loss: it does not depend on any weight that the optimizer trains. Call the model that loss receives as "
            "its first argument, not one from outside."
        )
    return total, buffers


def micro_batches(batch: Any, count: int) -> Sequence[Any]:
    """Return a batch as a list of ``count`` parts.

    Raises:
        ValueError: for another number of parts.
    """
    if count == 1:
        return [batch]
    if not isinstance(batch, list | tuple) or len(batch) != count:
        got = f"{len(batch)} parts" if isinstance(batch, list | tuple) else type(batch).__name__
        raise ValueError(f"batch: expected a list of {count} micro-batches (accumulate={count}), got {got}.")
    return batch


def _checked(loss: object) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"loss: expected a tensor of shape (), got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a tensor of shape (), got shape {tuple(loss.shape)}. Take its mean().")
    if not loss.requires_grad:
        raise ValueError(
            "loss: it has no graph. Compute it with the model that loss receives as its first argument, outside of "
            "torch.no_grad(), and do not detach it."
        )
    return loss.reshape(())
