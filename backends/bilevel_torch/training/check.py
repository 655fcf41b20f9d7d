"""Checks of the first step: against the optimizer of the installed torch, and of the weights."""

from typing import Any, NamedTuple

import torch

from bilevel_torch.training.calls import Tensors, equal
from bilevel_torch.training.rules import Options, Slots, rule_of
from bilevel_torch.training.rules.rule import value
from bilevel_torch.training.state import to_torch

PLAIN = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}  # for tensors on any device


class Update(NamedTuple):
    """An update of one weight. A gradient of None: the loss does not use the weight."""

    param: torch.Tensor
    grad: torch.Tensor | None
    slots: Slots
    after: torch.Tensor


def check_update(optimizer: torch.optim.Optimizer, groups: list[list[Update]], options: list[Options]) -> None:
    """Run the optimizer's class once from the same state, and compare the new weights.

    Raises:
        RuntimeError: if they differ by more than rounding, so that the rule is not the installed one.
    """
    values = [{name: _value(option) for name, option in of.items()} for of in options]
    params = [[update.param.detach().clone().requires_grad_() for update in updates] for updates in groups]
    given = [_group(optimizer, of, tensors) for of, tensors in zip(values, params, strict=True) if tensors]
    kind: Any = type(optimizer)
    reference: torch.optim.Optimizer = kind(given)
    pairs: list[tuple[torch.Tensor, Update]] = []
    for tensors, updates, of in zip(params, groups, values, strict=True):
        pairs += zip(tensors, updates, strict=True)
        for param, update in zip(tensors, updates, strict=True):
            param.grad = None if update.grad is None else update.grad.detach().clone()
            if state := to_torch(optimizer, _begun(optimizer, update, of)):
                reference.state[param] = state
    reference.step()
    for param, update in pairs:
        if not param.numel():
            continue
        before, expected, got = (t.detach() for t in (update.param, param, update.after))
        eps = torch.finfo(param.dtype).eps
        # The bound is coarse: a wrong rule is off by a whole step, and rounding is relative to both terms.
        bound = (1e-4 + 32 * eps) * (expected - before).abs().amax() + 16 * eps * before.abs().amax()
        same = ((got - expected).abs() <= bound) | (got == expected) | (got.isnan() & expected.isnan())
        if not bool(same.all()):
            raise RuntimeError(
                f"{type(optimizer).__name__}: the differentiable rule and the optimizer of torch {torch.__version__} "
                f"differ by {(got - expected).abs().amax().item():.2g} in the first step. Use another optimizer, and "
                "report this."
            )


def check_unchanged(before: Tensors, params: Tensors) -> None:
    """Raise a ValueError if a loss has written to a weight."""
    for name, param in params.items():
        if not equal(before[name], param):
            raise ValueError(
                f"loss: it changed the weight {name!r} in place, as Embedding(max_norm=...) does. Change the weights "
                "in the state that the step returns."
            )


def _begun(optimizer: torch.optim.Optimizer, update: Update, options: Options) -> Slots:
    """Return the slots that an update starts from."""
    rule = rule_of(optimizer)
    if update.slots.get("step") != 0 or not rule.fresh:
        return update.slots
    start = rule.start(update.param.detach(), options)
    return {**update.slots, **{name: start[name] for name in rule.fresh}}


def _group(optimizer: torch.optim.Optimizer, options: Options, params: list[torch.Tensor]) -> Options:
    given = {name: option for name, option in {**options, **PLAIN}.items() if name in optimizer.defaults}
    return {**given, "params": params}


def _value(option: Any) -> Any:
    if isinstance(option, tuple | list):
        return tuple(map(value, option))
    return value(option) if isinstance(option, torch.Tensor) else option
