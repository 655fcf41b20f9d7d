"""Vectors that are sharded over ranks as parameters are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from typing_extensions import override

from bilevel.spaces.array import Number, V
from bilevel.spaces.space import X
from bilevel.spaces.tree import leaves, tree_map
from bilevel_torch.shards import is_dtensor, local, local_tree, pieces, wrapped, wrapped_tree
from bilevel_torch.space import TorchSpace


class ShardedSpace(TorchSpace[V]):
    """Vectors whose leaves are DTensors or plain tensors. Each rank computes with its own parts.

    A dot product is summed over the ranks. Each entry counts once, no matter how many ranks hold a copy of it. Plain
    tensors are equal on all ranks. A stack of vectors has the parts of this rank as plain tensors. So do `ravel` and
    `unravel`: their array has the entries of this rank.
    """

    def __init__(self, like: V, group: Any = None) -> None:
        super().__init__(like)
        self.group = group
        self.own: TorchSpace[V] = TorchSpace(local_tree(like))
        ranks = dist.get_world_size(group)
        self.copies = [ranks / pieces(t) for t in leaves(like)]

    # Entrywise operations: each rank computes its parts.

    @override
    def cast(self, value: Any, like: Any) -> Any:
        return super().cast(value, local(like))

    @override
    def map(self, function: Callable[..., Any], x: X, *rest: object) -> X:
        def of_parts(a: Any, *others: Any) -> Any:
            part = local(a)
            return wrapped(super(ShardedSpace, self).cast(function(part, *map(local, others)), part), a)

        return tree_map(of_parts, x, *rest)

    @override
    def axpy(self, alpha: Number, x: V, y: V) -> V:
        return wrapped_tree(self.own.axpy(alpha, local_tree(x), local_tree(y)), y)

    @override
    def axpby_where(self, flag: Any, alpha: Number, x: V, y: V, beta: Number = 1.0) -> V:
        self.own.axpby_where(flag, alpha, local_tree(x), local_tree(y), beta)  # in place
        return y

    @override
    def scale(self, alpha: Number, x: V) -> V:
        return wrapped_tree(self.own.scale(alpha, local_tree(x)), x)

    @override
    def where(self, flag: Any, x: X, y: X) -> X:
        return wrapped_tree(self.own.where(flag, local_tree(x), local_tree(y)), x)

    @override
    def zeros(self, shared: bool = False) -> V:
        return wrapped_tree(self.own.zeros(shared), self.like)

    # Numbers of all ranks.

    @override
    def dot(self, x: V, y: V) -> torch.Tensor:
        return super().dot(local_tree(x), local_tree(y))

    @override
    def stack_dot(self, stack: object, x: V) -> torch.Tensor:
        return super().stack_dot(stack, local_tree(x))

    @override
    def _total(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the sum over the leaves and the ranks. An entry with copies on several ranks counts once."""
        total = super()._total([part / copies for part, copies in zip(parts, self.copies, strict=True)])
        dist.all_reduce(total, group=self.group)
        return total

    @override
    def max_abs(self, x: V) -> torch.Tensor:
        most = self.own.max_abs(local_tree(x))  # this rank may have no entries, which gives zero
        bad = torch.isnan(most)  # the maximum over the ranks may lose a nan
        both = torch.stack([torch.where(bad, torch.zeros_like(most), most), bad.to(most.dtype)]).double()
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return torch.where(both[1] > 0, both[1] * float("nan"), both[0]).to(most.dtype)

    @override
    def isfinite(self, x: object) -> Any:
        finite: Any = self.own.isfinite(local_tree(x))
        flag = finite.to(torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return flag.bool()

    @override
    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: torch.Tensor) -> torch.Tensor:
        result = self.own.numpy_callback(function, *arrays)
        dist.broadcast(result, group=self.group, group_src=0)  # other machines may round otherwise
        return result

    # Draws, stacks and arrays.

    @override
    def normal(self, seed: int, count: int | None = None) -> Any:
        """Draw each leaf whole, and keep the part of this rank. One process draws the same numbers."""
        options: Any = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float32}
        if count is None:
            return tree_map(lambda a: wrapped(_part(torch.randn(a.shape, **options), a), a), self.like)

        def rows(a: Any) -> torch.Tensor:
            return torch.stack([_part(row, a) for row in torch.randn((count, *a.shape), **options)])

        return tree_map(rows, self.like)

    @override
    def stack(self, count: int) -> Any:
        return self.own.stack(count)

    @override
    def set(self, stack: Any, i: torch.Tensor, x: V) -> Any:
        return self.own.set(stack, i, local_tree(x))

    @override
    def get(self, stack: Any, i: torch.Tensor) -> V:
        return wrapped_tree(self.own.get(stack, i), self.like)

    @override
    def linear_combination(self, coefficients: Any, stack: Any) -> V:
        return wrapped_tree(self.own.linear_combination(coefficients, stack), self.like)

    @override
    def ravel(self, x: object) -> torch.Tensor:
        return self.own.ravel(local_tree(x))

    @override
    def unravel(self, array: torch.Tensor) -> V:
        return wrapped_tree(self.own.unravel(array), self.like)

    @override
    def materialise(self, operator: Callable[[V], V]) -> torch.Tensor:
        raise TypeError(
            'Sharded: a solver needs the whole matrix, which no rank can hold. Use an iterative solver, such as "cg".'
        )


def _part(whole: torch.Tensor, a: Any) -> torch.Tensor:
    """Return this rank's part of a tensor that every rank holds, in the layout, dtype and device of a."""
    if is_dtensor(a):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(a.device)
        whole = distribute_tensor(whole, a.device_mesh, a.placements, src_data_rank=None).to_local()
    return whole.to(local(a))
