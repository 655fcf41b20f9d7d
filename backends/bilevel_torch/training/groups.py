"""The options of an optimizer's parameter groups: their numbers, and the tensors that replace them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bilevel_torch.training.rules import Options
from bilevel_torch.training.rules.rule import active

CLIPS = ("clip_norm", "clip_value")
OptionsFunction = Callable[[Any, int, dict[str, Any]], Mapping[str, Any]]
"""(hparams, step number, numeric options of a group) → the options to replace."""


def numbers_of(optimizer: torch.optim.Optimizer) -> list[Options]:
    """Return the numeric options of each group, as floats, ints and tuples of them.

    Raises:
        ValueError: for an option with more than one entry, or with a gradient.
    """
    groups = [{**group, **_fixed_for_all(optimizer)} for group in optimizer.param_groups]
    return [
        {name: _number(f"param group {i}: {name}", group[name]) for name in optimizer.defaults if _numeric(group[name])}
        for i, group in enumerate(groups)
    ]


def flags_of(optimizer: torch.optim.Optimizer) -> list[Options]:
    """Return the other options of each group, such as ``maximize``."""
    return [
        {name: group[name] for name in optimizer.defaults if not _numeric(group[name])}
        for group in optimizer.param_groups
    ]


def replaced(index: int, numbers: Options, given: object) -> Options:
    """Return the numeric options of a group with those that the user's function returned.

    Raises:
        TypeError: unless the function returned a dict of numbers and 0-d tensors.
        ValueError: for an unknown option, for a momentum in a group without, or for both limits of gradients.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"options: expected a dict of options for param group {index}, got {type(given).__name__}.")
    given = {name: option for name, option in given.items() if name != "index"}
    for name, option in given.items():
        if name not in numbers and name not in CLIPS:
            raise ValueError(
                f"options: param group {index} has no numeric option {name!r}. It has {', '.join(numbers)}; "
                f"{' and '.join(CLIPS)} are options too."
            )
        _check(f"options: {name} of param group {index}", option, numbers.get(name, 0.0))
        if name == "momentum" and not numbers[name] and active(option):
            raise ValueError(
                f"options: param group {index} has no momentum, so the optimizer keeps no buffer for it. Construct the "
                "optimizer with a momentum other than 0, for example the value in hparams."
            )
    options = {**numbers, **given}
    if all(name in options for name in CLIPS):
        raise ValueError(f"options: param group {index} has {' and '.join(CLIPS)}. Give one of them.")
    return options


def _fixed_for_all(optimizer: torch.optim.Optimizer) -> Options:
    """Return the option that Adagrad takes from its constructor in place of the group."""
    name = "initial_accumulator_value"
    return {name: optimizer.defaults[name]} if name in optimizer.defaults else {}


def _numeric(option: object) -> bool:
    if isinstance(option, tuple | list):
        return all(map(_numeric, option))
    return isinstance(option, int | float | torch.Tensor) and not isinstance(option, bool)


def _number(name: str, option: Any) -> Any:
    if isinstance(option, tuple | list):
        return tuple(_number(name, entry) for entry in option)
    if not isinstance(option, torch.Tensor):
        return option
    if option.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient. The optimizer takes only its value. Give the optimizer a "
            "number, put the tensor into hparams, and return it from the function `options`."
        )
    return option.item()


def _check(name: str, option: Any, number: Any) -> None:
    if isinstance(number, tuple):
        if not (isinstance(option, tuple | list) and len(option) == len(number)):
            raise TypeError(f"{name}: expected a tuple of {len(number)} numbers or 0-d tensors, got {option!r}.")
        for entry in option:
            _check(name, entry, 0.0)
    elif isinstance(option, torch.Tensor):
        if option.dim() or not option.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor of shape (), got {option.dtype} of shape "
                f"{tuple(option.shape)}. Index it, or take reshape(())."
            )
    elif not _numeric(option):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(option).__name__}.")
