"""Compute large operations of gathered parameters again in each backward pass.

A product has two gradients by each parameter: one from the backward pass inside of ∇L, one from the forward pass. If
both arrive at one gathered parameter, autograd keeps the first until the second is there. So each rank would hold a
whole vector. Here each backward pass gathers the parameter by itself, and reduces its gradient at once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from bilevel_torch.shards import local

LARGE = {
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.mm, torch.matmul, torch.addmm, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__),
}
"""Operations that are deterministic, and have gradients that depend on the parameters."""

READS = "parameters read by bilevel"
"""The key of a list of `Read` in the metadata of a node."""
GATHERED = "parameter gathered by bilevel"
"""The key of a `Read` in the metadata of a node that gathers a parameter."""


class Read(NamedTuple):
    """A sharded parameter that a graph reads.

    Attributes:
        param: the sharded parameter.
        mark: the sum of its entries on this rank.
        gather: the function that gathers it.
        reduce: the function that reduces a gradient by the gathered parameter.
    """

    param: Any
    mark: torch.Tensor
    gather: Callable[[Any], torch.Tensor]
    reduce: Callable[[torch.Tensor], Any]


def mark(param: Any) -> torch.Tensor:
    """Return a number that changes with the entries of a parameter on this rank."""
    return torch.nan_to_num(local(param)).sum(dtype=torch.float64)


def changed(nodes: Iterable[Any]) -> torch.Tensor | None:
    """Return whether a parameter has changed since a graph read it, as a number; None if the graph reads none.

    PyTorch's own check sees no change of a DTensor by a foreach or a fused optimizer.
    """
    differ = [mark(read.param) != read.mark for node in nodes for read in node.metadata.get(READS, [])]
    return torch.stack(differ).any().double() if differ else None


class Recomputation(TorchFunctionMode):
    """Replace large operations of gathered parameters by functions of the sharded parameters.

    Args:
        pack: the function by which graphs save gathered parameters, outside of checkpoints.
    """

    def __init__(self, pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in LARGE or kwargs or not torch.is_grad_enabled() or self._in_checkpoint():
            return func(*args, **(kwargs or {}))
        reads = {i: read for i, a in enumerate(args) if (read := _read(a)) is not None}
        if not reads:
            return func(*args)
        inputs = [reads[i].param if i in reads else a for i, a in enumerate(args)]
        gathered = [a if i in reads else None for i, a in enumerate(args)]
        result: Any = _Recomputed.apply(func, gathered, reads, *inputs)
        result.grad_fn.metadata[READS] = list(reads.values())
        return result

    def _in_checkpoint(self) -> bool:
        """Return whether a checkpoint runs, which computes all its operations again."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        return hooks is not None and hooks[0] != self.pack


def _read(value: object) -> Read | None:
    """Return the parameter that a value is; None for any other value."""
    node: Any = value.grad_fn if isinstance(value, torch.Tensor) else None
    return None if node is None else node.metadata.get(GATHERED)


class _Recomputed(torch.autograd.Function):
    """An operation of sharded parameters, without a graph inside. Its backward pass has derivatives."""

    @staticmethod
    def forward(ctx: Any, func: Any, gathered: Sequence[Any], reads: dict[int, Read], *inputs: Any) -> torch.Tensor:
        ctx.func, ctx.reads = func, reads
        ctx.tensors = [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in inputs]
        ctx.save_for_backward(*[inputs[i] for i in ctx.tensors])
        return func(*[a if whole is None else whole for a, whole in zip(inputs, gathered, strict=True)])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # pyright: ignore
        again = torch.is_grad_enabled()
        places = [i for i in ctx.tensors if ctx.needs_input_grad[i + 3]]
        inputs = list(ctx.others)
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            for i, t in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                # A view: one input may be computed from another.
                inputs[i] = ctx.reads[i].gather(t) if i in ctx.reads else t.view_as(t)
            wanted = [inputs[i] for i in places]
            found = torch.autograd.grad(ctx.func(*inputs), wanted, g, create_graph=again, allow_unused=True)
        grads: list[Any] = [None] * len(inputs)
        for i, grad in zip(places, found, strict=True):
            grads[i] = ctx.reads[i].reduce(grad) if i in ctx.reads and grad is not None else grad
        return None, None, None, *grads
