"""Many solves at once, by `torch.func.vmap` over a solver."""
# pyright: reportIncompatibleMethodOverride=false

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from bilevel.backend import R
from bilevel.spaces import loops
from bilevel.spaces.array import Number, V
from bilevel.spaces.space import Space, State, X
from bilevel.spaces.tree import leaves, tree_map, with_leaves
from bilevel_torch.backend import TorchBackend
from bilevel_torch.implicit_rules import Rule
from bilevel_torch.space import TorchSpace


class RowsBackend(TorchBackend):
    """The backend inside of `torch.func.vmap`. Its spaces neither read flags nor write in place."""

    @property
    @override
    def by_rows(self) -> "RowsBackend":
        return self

    @override
    def space(self, tree: V) -> "RowsSpace[V]":
        return RowsSpace(tree)

    @override
    def batched(self, function: Callable[..., R], *stacks: Any) -> R:
        """Run all rows together. If an operation does not support vmap, run one row after the other."""
        structure: list[Any] = []

        def of_leaves(*row: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = function(*with_leaves(stacks, row))
            structure[:] = [result]
            return tuple(leaves(result))

        try:
            with warnings.catch_warnings():
                # Some operations, such as the LSTM's, run one row after the other. Users cannot change that.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                results = torch.func.vmap(of_leaves)(*leaves(stacks))
        except RuntimeError:  # an error of the function itself appears again
            return super().batched(function, *stacks)
        return with_leaves(structure[0], results)


class RowsSpace(TorchSpace[V]):
    """A space whose operations work inside of `torch.func.vmap`. A loop runs until no row is live."""

    axpby_where, zeros = Space.axpby_where, Space.zeros

    @override
    def axpy(self, alpha: Number, x: V, y: V) -> V:
        return tree_map(lambda b, a: torch.add(b, self._like(alpha, b) * a), y, x)

    @override
    def scale(self, alpha: Number, x: V) -> V:
        return tree_map(lambda a: a * self._like(alpha, a), x)

    @override
    def set(self, stack: Any, i: torch.Tensor, x: V) -> Any:
        def put(s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            here = torch.arange(s.shape[0], device=s.device) == i
            return torch.where(here.reshape(-1, *[1] * a.ndim), a, s)

        return tree_map(put, stack, x)

    @override
    def while_loop(
        self, live: Callable[[State], Any], body: Callable[[State], State], state: State, max_steps: int
    ) -> State:
        every = 1 if live(state).device.type == "cpu" else 8  # a reading waits for the device
        return loops.while_loop(lambda s: _any(live(s)), body, state, max_steps, every)

    @override
    def cond(self, flag: Any, body: Callable[[State], State], state: State) -> State:
        return self.where(flag, body(state), state) if _any(flag) else state

    @override
    def where(self, flag: Any, x: X, y: X) -> X:
        return tree_map(lambda a, b: torch.where(flag, a, b), x, y)

    @override
    def numpy_callback(self, function: Callable[..., np.ndarray], *arrays: torch.Tensor) -> torch.Tensor:
        return _Callback.apply(lambda *row: super(RowsSpace, self).numpy_callback(function, *row), *arrays)[0]

    @staticmethod
    def _like(alpha: object, a: torch.Tensor) -> Any:
        return alpha.to(a.dtype) if isinstance(alpha, torch.Tensor) else alpha


def _any(flag: torch.Tensor) -> bool:
    """Return whether a flag is up in any row."""
    seen: list[bool] = []
    _Read.apply(lambda flags: seen.append(bool(flags.any())), flag)
    return seen[0]


class _Read(torch.autograd.Function):
    """Call a function with a tensor, which has the entries of all rows inside of vmap."""

    @staticmethod
    def forward(read: Callable[[torch.Tensor], None], tensor: torch.Tensor) -> torch.Tensor:
        read(tensor)
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, read: Callable[[torch.Tensor], None], tensor: torch.Tensor) -> Any:
        read(tensor)
        return tensor.clone(), in_dims[1]


class _Callback(Rule):
    """Call a function of tensors, once for each row inside of vmap."""

    @staticmethod
    def forward(function: Callable[..., torch.Tensor], *arrays: torch.Tensor) -> tuple[torch.Tensor]:
        return (function(*arrays),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor]) -> None:
        pass
