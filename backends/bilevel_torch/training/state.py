"""The state of a training run, and its exchange with an optimizer of torch."""

from typing import Any, NamedTuple

import torch

from bilevel_torch.training.rules import Options, Rule, Slots


class TrainingState(NamedTuple):
    """The values that a training step changes.

    Attributes:
        params: the weights that the optimizer trains, by their names in the model.
        buffers: all buffers of the model, by their names.
        optimizer: the slots of each weight: tensors such as ``exp_avg``, and ``step``, the number of its updates (for
            SGD, 1 after the first).
        step: the number of steps since the `TrainingStep` was constructed.
    """

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    optimizer: dict[str, Slots]
    step: int


def slots_of(rule: Rule, param: torch.Tensor, options: Options, state: dict[str, Any]) -> Slots:
    """Return copies of what an optimizer keeps for a parameter, or the slots before its first update."""
    slots = rule.start(param.detach(), options)
    for name in slots:
        if isinstance(state.get(name), torch.Tensor | int | float):
            slots[name] = _copied(slots[name], state[name])
    if "step" in slots and "step" not in state and state.get("momentum_buffer") is not None:
        slots["step"] = 1
    return slots


def to_torch(optimizer: torch.optim.Optimizer, slots: Slots) -> dict[str, Any]:
    """Return slots as the optimizer keeps them."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": slots["momentum_buffer"].detach().clone()} if slots.get("step") else {}
    return {
        name: slot.detach().clone() if isinstance(slot, torch.Tensor) else torch.tensor(float(slot))
        for name, slot in slots.items()
    }


def _copied(slot: Any, given: Any) -> Any:
    """Return a copy of an optimizer's number or tensor, in the type and dtype of a slot."""
    if not isinstance(slot, torch.Tensor):
        return int(given)
    return torch.as_tensor(given).detach().to(slot.device, slot.dtype, copy=True)
