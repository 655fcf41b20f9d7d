"""What PyTorch users hand over as params and hparams, as a tree."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

TensorTree = torch.Tensor | torch.nn.ParameterDict | Mapping[str, Any] | Iterable[Any]
"""A tensor, or a list, dict or iterable of tensors, which may be nested."""


def tree_of(name: str, given: object) -> Any:
    """Return a tensor, dict, list or tuple as it is; other mappings as a dict, other iterables as a list.

    Pairs of names and tensors (``module.named_parameters()``) become a dict.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(given, torch.Tensor | dict):
        return given
    if isinstance(given, Mapping | torch.nn.ParameterDict):
        return dict(given.items())
    if isinstance(given, torch.nn.Module) and not isinstance(given, torch.nn.ParameterList):
        raise TypeError(f"{name} is a module: pass its parameters(), or its named_parameters() for errors by name.")
    if not isinstance(given, Iterable):
        what = type(given).__name__
        raise TypeError(f"{name}: expected a tensor, or a list, dict or iterable of tensors, got {what}.")
    items = given if isinstance(given, list | tuple) else list(given)
    if not items and iter(given) is given:
        raise ValueError(f"{name}: the iterator is empty; one such as module.parameters() serves one call only.")
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items]
    return dict(items) if items and all(pairs) else items
