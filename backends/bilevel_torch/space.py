"""Trees of tensors as vectors, without a host synchronisation per operation."""
# pyright: reportPrivateImportUsage=false
# (PyTorch documents its foreach functions, and exports them with an underscore.)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.spaces import loops
from bilevel.spaces.tree import leaves, tree_map, with_leaves

WIDE = (torch.float32, torch.float64)  # enough to add up dots in


class _Namespace:
    """PyTorch's functions, with one of them made of two operations in place of five."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def isfinite(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x) == 0


@dataclass(frozen=True)
class TorchSpace:
    """See `bilevel.protocols.VectorSpace`.

    A vector is any tree of tensors; a list of them is quickest.

    Args:
        check_every: read a loop's flag, and so wait for the device, every so many steps; None: at each one
            on the CPU, where reading is free, else at every eighth.
    """

    check_every: int | None = None
    xp = _Namespace()

    def dot(self, x: Any, y: Any) -> torch.Tensor:
        dots = [_dot(a, b) for a, b in zip(leaves(x), leaves(y), strict=True)]
        return sum(dots[1:], start=dots[0])

    def axpy(self, alpha: Any, x: Any, y: Any) -> Any:
        xs, ys = leaves(x), leaves(y)
        number = self._number(alpha)
        if isinstance(number, torch.Tensor):  # add(alpha=tensor) would synchronise
            return with_leaves(y, [torch.addcmul(b, a, number.to(b.dtype)) for a, b in zip(xs, ys, strict=True)])
        return with_leaves(y, torch._foreach_add(ys, xs, alpha=number))

    def update(self, flag: Any, alpha: Any, x: Any, y: Any, beta: Any = None) -> Any:
        """Work in place, so that the old vector and the new one are not there at once."""
        xs, ys = leaves(x), leaves(y)
        if not self._reads_freely(flag):
            new = leaves(self.axpy(alpha, xs, ys if beta is None else self.scale(beta, ys)))
            for a, b in zip(new, ys, strict=True):
                b.copy_(torch.where(flag, a, b))
        elif flag:
            if beta is not None:
                torch._foreach_mul_(ys, self._number(beta))
            torch._foreach_add_(ys, xs, alpha=self._number(alpha))
        return y

    def scale(self, alpha: Any, x: Any) -> Any:
        xs, number = leaves(x), self._number(alpha)
        if isinstance(number, torch.Tensor):  # two zero-dimensional tensors would promote
            return with_leaves(x, [a * number.to(a.dtype) for a in xs])
        return with_leaves(x, torch._foreach_mul(xs, number))

    def _number(self, alpha: Any) -> Any:
        """Return a scalar as a Python number where that can be read freely."""
        return alpha.item() if isinstance(alpha, torch.Tensor) and self._reads_freely(alpha) else alpha

    def zeros_like(self, x: Any) -> Any:
        return tree_map(lambda a: torch.zeros_like(a, requires_grad=False), x)

    def map(self, function: Callable, x: Any, *rest: Any) -> Any:
        return tree_map(lambda a, *others: function(a, *others).to(a.dtype), x, *rest)

    def select(self, flag: torch.Tensor, x: Any, y: Any) -> Any:
        if self._reads_freely(flag):
            return x if flag else y
        return tree_map(lambda a, b: torch.where(flag, a, b), x, y)

    def normal_like(self, x: Any, seed: int) -> Any:
        """Draw on the CPU, so that every device sees the same numbers."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(a: torch.Tensor) -> torch.Tensor:
            return torch.randn(a.shape, generator=generator, dtype=torch.float32, device="cpu").to(a)

        return tree_map(draw, x)

    def max_abs(self, x: Any) -> torch.Tensor:
        # By its ends: the absolute values would be one more vector.
        ends = [torch.maximum(leaf.amax(), -leaf.amin()) for leaf in leaves(x) if leaf.numel()]
        parts = [end.to(_accumulator(end, end)) for end in ends]
        return torch.stack(parts).amax() if parts else self.dot(x, x)

    def isfinite(self, x: Any) -> torch.Tensor:
        return torch.stack([torch.isfinite(leaf).all() for leaf in leaves(x)]).all()

    def eps(self, x: Any) -> float:
        return max(torch.finfo(leaf.dtype).eps for leaf in leaves(x))

    def size(self, x: Any) -> int:
        return sum(leaf.numel() for leaf in leaves(x))

    def stack_like(self, x: Any, count: int) -> Any:
        return tree_map(lambda a: a.new_zeros((count, *a.shape)), x)

    def put(self, stack: Any, i: torch.Tensor, x: Any) -> Any:
        return tree_map(lambda s, a: s.index_copy_(0, i.reshape(1).long(), a[None]), stack, x)

    def take(self, stack: Any, i: torch.Tensor) -> Any:
        return tree_map(lambda s: s.index_select(0, i.reshape(1).long())[0], stack)

    def project(self, stack: Any, x: Any) -> torch.Tensor:
        parts = [_project(s, a) for s, a in zip(leaves(stack), leaves(x), strict=True)]
        return sum(parts[1:], start=parts[0])

    def combine(self, coefficients: torch.Tensor, stack: Any) -> Any:
        return tree_map(lambda s: torch.tensordot(coefficients.to(s.dtype), s, 1), stack)

    def sequence(self, items: Sequence[Any]) -> Callable[[Any], Any]:
        return loops.sequence(items)

    def while_loop(self, live: Callable, body: Callable, state: Any, max_steps: int) -> Any:
        every = self.check_every or (1 if self._reads_freely(live(state)) else 8)
        return loops.while_loop(live, body, state, max_steps, every)

    def _reads_freely(self, flag: torch.Tensor) -> bool:
        return self.check_every is None and flag.device.type == "cpu"

    def scan(self, body: Callable, state: Any, xs: Any, length: int, reverse: bool = False) -> tuple[Any, Any]:
        return loops.scan(body, state, xs, length, reverse)

    def cond(self, flag: torch.Tensor, body: Callable, state: Any) -> Any:
        return body(state) if flag else state

    def ravel(self, x: Any) -> torch.Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in leaves(x)])

    def unravel(self, array: torch.Tensor, like: Any) -> Any:
        parts = iter(array.split([leaf.numel() for leaf in leaves(like)]))
        return tree_map(lambda a: next(parts).reshape(a.shape).to(a), like)

    def dense(self, operator: Callable, like: Any) -> torch.Tensor:
        flat = self.ravel(like)
        basis = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        return torch.stack([self.ravel(operator(self.unravel(e, like))) for e in basis], dim=1)

    def on_host(self, function: Callable, *arrays: torch.Tensor) -> torch.Tensor:
        host = (a.detach().to("cpu", torch.float64).numpy() for a in arrays)
        return torch.from_numpy(np.asarray(function(*host))).to(arrays[-1])


def _accumulator(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not (a.dtype == b.dtype and a.dtype in WIDE):
        dtype = _accumulator(a, b)
        a, b = a.to(dtype), b.to(dtype)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _project(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    dtype = _accumulator(s, a)
    return s.reshape(s.shape[0], a.numel()).to(dtype) @ a.reshape(-1).to(dtype)
