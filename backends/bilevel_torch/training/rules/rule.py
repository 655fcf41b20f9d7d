"""The type of an update rule, and the operations that rules share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Slots = dict[str, Any]
"""The state of one parameter in an optimizer: tensors, and the number of updates as ``"step"``, an int."""

Options = dict[str, Any]
"""The options of a parameter group. A numeric one is a number, a 0-d tensor with or without a graph, or a tuple of
them."""


class Rule(NamedTuple):
    """An optimizer's update of one parameter, as pure functions.

    Attributes:
        start: (param, options) → the slots before the first update.
        update: (param, grad, slots, options) → the new parameter and the new slots.
        fresh: the slots that the first update computes from the options, in place of the given ones.
    """

    start: Callable[[torch.Tensor, Options], Slots]
    update: Callable[[torch.Tensor, torch.Tensor, Slots, Options], tuple[torch.Tensor, Slots]]
    fresh: tuple[str, ...] = ()


def root(x: torch.Tensor) -> torch.Tensor:
    """Return √x, with a derivative of zero where x is exactly zero.

    A second moment is zero where all gradients of an entry were zero. The first moment, a factor of the root's
    derivative, is zero there too. The derivative of `torch.sqrt` is infinite, and infinity times zero is nan.
    """
    if not torch.is_grad_enabled():
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, x, torch.where(zero, 1.0, x).sqrt())


def loss_gradient(param: torch.Tensor, grad: torch.Tensor, options: Options, decay: bool = True) -> torch.Tensor:
    """Return the gradient that an update descends: negative for ``maximize``, with L2 decay if ``decay``."""
    grad = -grad if options.get("maximize", False) else grad
    return grad + options["weight_decay"] * param if decay and active(options["weight_decay"]) else grad


def decayed(param: torch.Tensor, options: Options) -> torch.Tensor:
    """Return the parameter after a decay that does not enter the gradient."""
    return param * (1 - options["lr"] * options["weight_decay"]) if active(options["weight_decay"]) else param


def average(old: torch.Tensor, new: torch.Tensor, rate: Any) -> torch.Tensor:
    """Return the moving average rate · old + (1 − rate) · new, in the form of `torch.lerp`."""
    return old + (1 - rate) * (new - old)


def clamp(x: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """Return x between two limits, each a number or a tensor."""
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        low, high = (torch.as_tensor(limit, dtype=x.dtype, device=x.device) for limit in (low, high))
    return torch.clamp(x, low, high)


def scalar(param: torch.Tensor, number: float) -> torch.Tensor:
    """Return a 0-d tensor for a slot, in the dtype of the parameter but not below float32."""
    return torch.tensor(number, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)


def active(option: Any) -> bool:
    """Return whether an option has an influence: it is a tensor or not zero. A tensor is not read."""
    return isinstance(option, torch.Tensor) or option != 0


def value(option: Any) -> float:
    """Return an option as a number."""
    return float(option.detach()) if isinstance(option, torch.Tensor) else option
