"""Convert params and hparams of PyTorch users to trees."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

TensorTree = torch.Tensor | torch.nn.ParameterDict | Mapping[str, Any] | Iterable[Any]
"""A tensor, or a list, dict or iterable of tensors, which may be nested."""


def tree_of(name: str, given: object) -> Any:
    """Return a tensor, dict, list or tuple unchanged; another mapping as a dict, another iterable as a list.

    Pairs of names and tensors (``module.named_parameters()``) become a dict.

    Raises:
        TypeError: for any other object.
        ValueError: for an exhausted iterator.
    """
    if isinstance(given, torch.Tensor | dict):
        return given
    if isinstance(given, Mapping | torch.nn.ParameterDict):
        return dict(given.items())
    if isinstance(given, torch.nn.Module) and not isinstance(given, torch.nn.ParameterList):
        raise TypeError(f"{name} is a module. Pass its parameters(), or its named_parameters() for names in errors.")
    if not isinstance(given, Iterable):
        got = type(given).__name__
        raise TypeError(f"{name}: expected a tensor, or a list, dict or iterable of tensors, got {got}.")
    items = given if isinstance(given, list | tuple) else list(given)
    if not items and iter(given) is given:
        raise ValueError(f"{name}: the iterator is empty. One such as module.parameters() serves only one call.")
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items]
    return dict(items) if items and all(pairs) else items
