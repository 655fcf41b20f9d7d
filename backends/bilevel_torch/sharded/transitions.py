"""Make gradients right where a graph goes from plain tensors to DTensors or back.

Hooks on the nodes of `DTensor.from_local` and `DTensor.to_local` prepare the gradients that arrive at them. Each node
gets its hook once. The hooks stay, and they do not change a gradient that PyTorch treats correctly.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bilevel_torch.shards import is_split

PREPARED = "prepared by bilevel"
Grads = Sequence[Any]


def prepare(nodes: Iterable[Any], group: Any, is_data_mesh: Callable[[Any], bool]) -> None:
    """Prepare the nodes of a graph whose gradients are averaged over the ranks of a group.

    Args:
        nodes: nodes of a graph of autograd.
        group: a process group.
        is_data_mesh: whether a mesh has ranks with different data.
    """
    for node in nodes:
        if PREPARED in node.metadata:
            continue
        if node.name() == "_FromTorchTensorBackward":
            node.metadata[PREPARED] = True
            node.register_prehook(_redistribution(node))
        elif node.name() == "_ToTorchTensorBackward" and node.grad_placements is None:
            spec = node.dtensor_spec
            if is_data_mesh(spec.mesh) and not any(map(is_split, spec.placements)):
                node.metadata[PREPARED] = True
                node.register_prehook(_mean(group))


def _redistribution(node: Any) -> Callable[[Grads], Grads]:
    """Return a hook that redistributes a gradient as `DTensor.from_local` does, but with a graph.

    PyTorch 2.13 redistributes it without a graph. So a second derivative would be wrong, without an error.
    """

    def hook(grads: Grads) -> Grads:
        from torch.distributed.tensor import Replicate

        placements = node.grad_placements or [
            Replicate() if p.is_partial() else p for p in node.forward_input_placements
        ]
        return tuple(g if g is None else g.redistribute(node.forward_input_device_mesh, placements) for g in grads)

    return hook


def _mean(group: Any) -> Callable[[Grads], Grads]:
    """Return a hook that averages a gradient over the ranks.

    ``full_tensor()`` assumes that its gradient is equal on all ranks. This is wrong if ranks have uneven shares.
    """
    return lambda grads: tuple(g if g is None else _Mean.apply(g, group) for g in grads)


class _Mean(torch.autograd.Function):
    """The mean over the ranks. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        mean = t / dist.get_world_size(group)
        dist.all_reduce(mean, group=group)
        return mean

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # pyright: ignore
        return _Mean.apply(g, ctx.group), None
