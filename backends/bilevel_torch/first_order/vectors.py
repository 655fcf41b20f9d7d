"""Lists of tensors as vectors. The tensors may be sharded (FSDP2), which `TorchSpace` does not support."""

from collections.abc import Sequence
from typing import Any

import torch

from bilevel_torch.shards import is_dtensor

Tensors = list[torch.Tensor]


def wide(t: torch.Tensor) -> torch.dtype:
    """Return a dtype in which small steps of v are not rounded away."""
    return torch.promote_types(t.dtype, torch.float32)


def dot(x: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the products of entries, in at least float32. Tensors may be sharded."""
    dots: list[Any] = [(a * b).sum(dtype=wide(a)) for a, b in zip(x, y, strict=True)]
    whole: list[Any] = [d.full_tensor() if is_dtensor(d) else d for d in dots]
    return torch.stack([d.to(whole[0]) for d in whole]).sum()


def norm(x: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm."""
    detached = [a.detach() for a in x]
    return dot(detached, detached).sqrt()
