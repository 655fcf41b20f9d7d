"""Lists of tensors as vectors. The tensors may be sharded (FSDP2), which `TorchSpace` does not support."""

from collections.abc import Sequence
from typing import Any

import torch

Tensors = list[torch.Tensor]


def wide(t: torch.Tensor) -> torch.dtype:
    """Return a dtype in which small steps of v are not rounded away."""
    return torch.promote_types(t.dtype, torch.float32)


def dot(x: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the products of entries, in at least float32. Tensors may be sharded."""
    dots = [(a * b).sum(dtype=wide(a)) for a, b in zip(x, y, strict=True)]
    whole: list[Any] = [getattr(d, "full_tensor", lambda d=d: d)() for d in dots]  # of sharded tensors
    return torch.stack([d.to(whole[0]) for d in whole]).sum()


def norm(x: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm."""
    detached = [a.detach() for a in x]
    return dot(detached, detached).sqrt()
