"""Running statistics of BatchNorm and InstanceNorm that carry their graph.

The layers of PyTorch update their running statistics in place without a graph, and cannot differentiate by them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}  # dimensions of an example's channel


@contextmanager
def differentiable_statistics(model: nn.Module) -> Iterator[None]:
    """Differentiate running statistics of normalization layers in this context.

    Layers in training mode assign new statistics with a graph. Layers in evaluation mode compute their output by a
    formula.
    """
    handles = []
    for module in model.modules():
        if isinstance(module, (*BATCH, *INSTANCE)) and module.running_mean is not None:
            kept: list[Any] = []
            handles.append(module.register_forward_pre_hook(_Keep(kept)))
            handles.append(module.register_forward_hook(_Renew(kept), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Keep:
    """Keep the statistics with their graph, and give the layer copies without."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def __call__(self, module: Any, args: object) -> None:
        self.kept[:] = module.running_mean, module.running_var
        module.running_mean, module.running_var = (t.detach().clone() for t in self.kept)


class _Renew:
    """Assign statistics with a graph. In evaluation mode, return the output as a function of them."""

    def __init__(self, kept: list[Any]) -> None:
        self.kept = kept

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        mean, var = self.kept
        x = args[0] if args else kwargs["input"]
        if module.training and module.track_running_stats:
            rate = module.momentum
            if rate is None:  # BatchNorm: the average of all batches. InstanceNorm: no update
                count: Any = module.num_batches_tracked
                rate = 1.0 / count.item() if isinstance(module, BATCH) else 0.0
            new_mean, new_var = _moments(module, x.to(mean.dtype))
            mean, var = (1 - rate) * mean + rate * new_mean, (1 - rate) * var + rate * new_var
        elif not module.training:
            output = _normalized(module, x, mean, var, output)
        module.running_mean, module.running_var = mean, var
        return output


def _moments(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the unbiased variance of each channel; for InstanceNorm, averages over the examples."""
    if isinstance(module, BATCH):
        axes = [i for i in range(x.dim()) if i != 1]
        return x.mean(axes), x.var(axes)
    size = next(n for cls, n in INSTANCE.items() if isinstance(module, cls))
    x = x if x.dim() == size + 2 else x.unsqueeze(0)
    axes = list(range(2, x.dim()))
    return x.mean(axes).mean(0), x.var(axes).mean(0)


def _normalized(
    module: Any, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    unbatched = any(isinstance(module, cls) and x.dim() == n + 1 for cls, n in INSTANCE.items())
    shape = [-1] + [1] * (x.dim() - (1 if unbatched else 2))
    y = (x - mean.view(shape)) * torch.rsqrt(var + module.eps).view(shape)
    y = y if module.weight is None else y * module.weight.view(shape)
    return (y if module.bias is None else y + module.bias.view(shape)).to(output.dtype)
