"""Trees of tensors as vectors, without a host synchronisation per operation."""
# pyright: reportPrivateImportUsage=false
# (PyTorch documents its foreach functions, and exports them with an underscore.)

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from bilevel.spaces import loops
from bilevel.spaces.array import Number, V
from bilevel.spaces.space import Space, State, X
from bilevel.spaces.tree import leaves, tree_map, with_leaves

WIDE = (torch.float32, torch.float64)  # precise enough to sum dot products


class _Namespace:
    """PyTorch's functions. `isfinite` takes two operations instead of five."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def isfinite(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x) == 0


class TorchSpace(Space[V]):
    """See `bilevel.spaces.space.Space`. A list of tensors is the fastest tree.

    Args:
        like: a tree of tensors.
        check_every: number of steps between readings of a loop's flag; a reading waits for the device. None: 1 on the
            CPU, where reading is free, else 8.
    """

    xp = _Namespace()

    def __init__(self, like: V, check_every: int | None = None) -> None:
        super().__init__(like)
        self.check_every = check_every

    @override
    def cast(self, value: Any, like: torch.Tensor) -> torch.Tensor:
        return value.to(like.dtype) if isinstance(value, torch.Tensor) else like.new_tensor(value)

    @override
    def zeros(self, shared: bool = False) -> V:
        return tree_map(lambda a: a.new_zeros(()).expand_as(a), self.like) if shared else super().zeros()

    @override
    def dot(self, x: V, y: V) -> Any:
        return self._total([_rows_dot(a.reshape(-1), b) for a, b in zip(leaves(x), leaves(y), strict=True)])

    def _total(self, parts: list[torch.Tensor]) -> Any:
        """Return the sum of the dots of the leaves."""
        return sum(parts[1:], start=parts[0])

    @override
    def axpy(self, alpha: Number, x: V, y: V) -> V:
        xs, ys, number = leaves(x), leaves(y), self._number(alpha)
        if isinstance(number, torch.Tensor):  # add(alpha=tensor) would synchronise
            return with_leaves(y, [torch.addcmul(b, a, number.to(b.dtype)) for a, b in zip(xs, ys, strict=True)])
        return with_leaves(y, torch._foreach_add(ys, xs, alpha=number))

    @override
    def axpby_where(self, flag: Any, alpha: Number, x: V, y: V, beta: Number = 1.0) -> V:
        """Work in place, so that memory does not hold the old vector and the new vector at once."""
        xs, ys = leaves(x), leaves(y)
        plain = isinstance(beta, float) and beta == 1.0
        if not self._reads_freely(flag):
            new = leaves(self.axpy(alpha, xs, ys if plain else self.scale(beta, ys)))  # pyright: ignore
            for a, b in zip(new, ys, strict=True):
                b.copy_(torch.where(flag, a, b))
        elif flag:
            if not plain:
                torch._foreach_mul_(ys, self._number(beta))
            torch._foreach_add_(ys, xs, alpha=self._number(alpha))
        return y

    @override
    def scale(self, alpha: Number, x: V) -> V:
        xs, number = leaves(x), self._number(alpha)
        if isinstance(number, torch.Tensor):  # two zero-dimensional tensors would promote
            return with_leaves(x, [a * number.to(a.dtype) for a in xs])
        return with_leaves(x, torch._foreach_mul(xs, number))

    def _number(self, alpha: object) -> Any:
        """Return a scalar as a Python number if reading it does not wait for a device."""
        return alpha.item() if isinstance(alpha, torch.Tensor) and self._reads_freely(alpha) else alpha

    @override
    def where(self, flag: Any, x: X, y: X) -> X:
        if self._reads_freely(flag):
            return x if flag else y
        return tree_map(lambda a, b: torch.where(flag, a, b), x, y)

    @override
    def normal(self, seed: int, count: int | None = None) -> Any:
        """Draw on the CPU, so that all devices get the same numbers."""
        options: Any = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float32, "device": "cpu"}
        rows = () if count is None else (count,)
        return tree_map(lambda a: torch.randn((*rows, *a.shape), **options).to(a), self.like)

    @override
    def max_abs(self, x: V) -> Any:
        # By the maximum and minimum: absolute values would need memory for one more vector.
        ends = [torch.maximum(leaf.amax(), -leaf.amin()) for leaf in leaves(x) if leaf.numel()]
        parts = [end.to(torch.promote_types(end.dtype, torch.float32)) for end in ends]
        return torch.stack(parts).amax() if parts else self.dot(x, x)

    @override
    def ravel(self, x: object) -> torch.Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in leaves(x)])

    @override
    def unravel(self, array: torch.Tensor) -> V:
        parts = iter(array.split([leaf.numel() for leaf in leaves(self.like)]))
        return tree_map(lambda a: next(parts).reshape(a.shape).to(a), self.like)

    @override
    def stack(self, count: int) -> Any:
        return tree_map(lambda a: a.new_zeros((count, *a.shape)), self.like)

    @override
    def set(self, stack: Any, i: torch.Tensor, x: V) -> Any:
        return tree_map(lambda s, a: s.index_copy_(0, i.reshape(1).long(), a[None]), stack, x)

    @override
    def get(self, stack: Any, i: torch.Tensor) -> V:
        return tree_map(lambda s: s.index_select(0, i.reshape(1).long())[0], stack)

    @override
    def stack_dot(self, stack: object, x: V) -> Any:
        pairs = zip(leaves(stack), leaves(x), strict=True)
        return self._total([_rows_dot(s.reshape(s.shape[0], a.numel()), a) for s, a in pairs])

    @override
    def linear_combination(self, coefficients: Any, stack: Any) -> V:
        return tree_map(lambda s: torch.tensordot(coefficients.to(s.dtype), s, 1), stack)

    @override
    def gram(self, rows: Any, others: Any) -> Any:
        pairs = zip(leaves(rows), leaves(others), strict=True)
        return self._total(
            [product(a.reshape(len(a), a[0].numel()), b.reshape(len(b), b[0].numel()).T) for a, b in pairs]
        )

    @override
    def while_loop(
        self, live: Callable[[State], Any], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        every = self.check_every or (1 if self._reads_freely(live(state)) else 8)
        return loops.while_loop(live, body, state, max_steps, every)

    def _reads_freely(self, flag: torch.Tensor) -> bool:
        return self.check_every is None and flag.device.type == "cpu"

    @override
    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: torch.Tensor) -> torch.Tensor:
        host = (a.detach().to("cpu", torch.float64).numpy() for a in arrays)
        return torch.from_numpy(np.asarray(function(*host))).to(arrays[-1])

    @override
    def materialise(self, operator: Callable[[V], V]) -> torch.Tensor:
        flat = self.ravel(self.like)
        basis = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        return torch.stack([self.ravel(operator(self.unravel(e))) for e in basis], dim=1)


def _rows_dot(rows: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return the dot product of an array with a vector, or with each row of a matrix."""
    return product(rows, a.reshape(-1))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a product of matrices or vectors, summed in at least float32."""
    if not (a.dtype == b.dtype and a.dtype in WIDE):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
    return a @ b
