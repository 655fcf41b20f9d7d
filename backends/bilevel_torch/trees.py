"""Convert params and hparams of PyTorch users to trees."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import TypeIs

from bilevel.spaces.array import V
from bilevel.spaces.tree import tree_map

TensorTree = torch.Tensor | torch.nn.ParameterDict | Mapping[str, Any] | Iterable[Any]
"""A tensor, or a list, dict or iterable of tensors, which may be nested."""

OF_GROUPS = "[p for group in optimizer.param_groups for p in group['params']]"


def tree_of(name: str, given: object) -> Any:
    """Return a tensor, dict, list or tuple unchanged; another mapping as a dict, another iterable as a list.

    Pairs of names and tensors (``module.named_parameters()``) become a dict.

    Raises:
        TypeError: for any other object.
        ValueError: for an exhausted iterator.
    """
    if isinstance(given, torch.optim.Optimizer):
        raise TypeError(f"{name} is an optimizer. Pass the tensors that it updates: {OF_GROUPS}.")
    for group in given if isinstance(given, list) else [given]:
        if _is_group(group):
            raise TypeError(f"{name}: got param_groups of an optimizer, with their options. Pass {OF_GROUPS}.")
    if isinstance(given, torch.Tensor | dict):
        return given
    if isinstance(given, Mapping | torch.nn.ParameterDict):
        return dict(given.items())
    if isinstance(given, torch.nn.Module) and not isinstance(given, torch.nn.ParameterList):
        raise TypeError(f"{name} is a module. Pass its parameters(), or its named_parameters() for names in errors.")
    if not isinstance(given, Iterable):
        hint = " Call it." if callable(given) else ""
        if _is_number(given):
            hint = f" Write torch.tensor({float(given)}, requires_grad=True), and compute the losses from this tensor."
        raise TypeError(
            f"{name}: expected a tensor, or a list, dict or iterable of tensors, got {type(given).__name__}.{hint}"
        )
    if hasattr(given, "__array__"):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}. Compute the losses with a tensor.")
    items = given if isinstance(given, list | tuple) else list(given)
    if not items and iter(given) is given:
        raise ValueError(
            f"{name}: the iterator is empty. One such as module.parameters() serves only one call. A module without "
            "parameters, such as a quantized one, cannot be trained."
        )
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items]
    return dict(items) if items and all(pairs) else items


def _is_group(given: object) -> bool:
    """Return whether an object is a parameter group: a dict with parameters and with options that are numbers."""
    return isinstance(given, dict) and isinstance(given.get("params"), list) and any(map(_is_number, given.values()))


def _is_number(value: object) -> TypeIs[int | float]:
    return isinstance(value, int | float)


def prune(tree: object, frozen: Sequence[bool]) -> Any:
    """Return a tree with None for the leaves with a flag. The paths of the other leaves stay."""
    flags = iter(frozen)
    return tree_map(lambda leaf: None if next(flags) else leaf, tree) if any(frozen) else tree


def fill(tree: V, pruned: Any) -> V:
    """Return a pruned tree with the leaves of a whole tree in place of None."""
    return tree_map(lambda leaf, other: leaf if other is None else other, tree, pruned)
