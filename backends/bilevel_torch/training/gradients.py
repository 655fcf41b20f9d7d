"""Gradients of a loss by the weights in a state, over micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bilevel_torch.autograd import grad
from bilevel_torch.training.calls import Caller, Tensors


def gradients(
    caller: Caller,
    params: Tensors,
    buffers: Tensors,
    loss: Callable[[Any, Any, Any], torch.Tensor],
    hparams: Any,
    batches: Sequence[Any],
    record: bool,
    check: bool,
) -> tuple[Tensors, Tensors]:
    """Return the gradient of the mean loss of the batches, and the buffers after them. One backward pass per batch.

    A weight that no loss uses has no entry, as its ``.grad`` is None in a loop.

    Args:
        check: whether to find an `autograd.Function` that hides its second derivative. It takes time.
    """
    inputs = list(params.values())

    def of_batch(model: Any, hparams: Any, batch: Any) -> Sequence[torch.Tensor | None]:
        """Differentiate while the model has the weights of the state: a checkpoint runs its modules again."""
        result = _checked(loss(model, hparams, batch))
        result = result / len(batches) if len(batches) > 1 else result
        if check:
            return grad([result], inputs, None, create_graph=True)
        return torch.autograd.grad(result, inputs, create_graph=record, allow_unused=True)

    total: Tensors = {}
    for batch in batches:
        found, buffers = caller.call(params, buffers, of_batch, (hparams, batch), record)
        for name, gradient in zip(params, found, strict=True):
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise TypeError(f"{name}: its gradient is sparse. Construct the embedding with sparse=False.")
            total[name] = total[name] + gradient if name in total else gradient
    if not total:
        raise ValueError(
            "loss: it does not depend on any weight that the optimizer trains. Call the model that loss receives as "
            "its first argument, not one from outside. A checkpoint with use_reentrant=True "
            "hides weights too."
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
    return loss.reshape(()) if loss.dim() else loss
