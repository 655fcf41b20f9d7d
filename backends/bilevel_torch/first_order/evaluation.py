"""Gradients of losses that run the user's module, at its weights and next to them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from bilevel_torch.first_order.vectors import Tensors
from bilevel_torch.isolation import random_states, set_random_states

Loss = Callable[[], torch.Tensor]
LOOSEST = 1e-2  # relative difference of the values of one loss, computed twice, at most


@dataclass(frozen=True)
class Gradients:
    """A loss and its gradients. A gradient is None for a tensor that the loss does not use."""

    value: torch.Tensor
    params: list[torch.Tensor | None]
    hparams: list[torch.Tensor | None]


class Evaluation:
    """Gradients by params and hparams, by ordinary backward passes into ``.grad``.

    `torch.autograd.grad` would leave out what DistributedDataParallel, FSDP2 and reentrant checkpoints do in a backward
    pass. So ``.grad`` is put aside meanwhile.
    """

    def __init__(self, module: torch.nn.Module, params: Tensors, hparams: Tensors) -> None:
        self._module, self._params, self._hparams = module, params, hparams

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Restore the buffers of the module, and the gradients of all tensors."""
        tensors = {id(t): t for t in [*self._module.parameters(), *self._hparams]}.values()
        grads = [(t, t.grad) for t in tensors]
        buffers = [(b, b.detach().clone()) for b in self._module.buffers()]
        for t in tensors:
            t.grad = None
        try:
            with torch.enable_grad():
                yield
        finally:
            for t, grad in grads:
                t.grad = grad
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)

    def gradients(self, name: str, losses: Sequence[Loss]) -> Gradients:
        """Return the mean of the losses and its gradients."""
        values = [self._backward(name, loss, len(losses)) for loss in losses]
        return Gradients(torch.stack(values).mean(), self._take(self._params), self._take(self._hparams))

    def difference(self, losses: Sequence[Loss], v: Tensors, step: torch.Tensor) -> Gradients:
        """Return the gradients at w + step · v, minus those at w − step · v. Both sides draw the same random numbers.

        The first gradients stay in ``.grad`` with the other sign. So the second backward passes form the difference.
        """
        with self._moved(v, step) as to:
            to(-1)
            for loss in losses:
                self._backward("inner", loss, len(losses))
            for t in [*self._params, *self._hparams]:
                if t.grad is not None:
                    t.grad.neg_()
            to(1)
            return self.gradients("inner", losses)

    def difference_by_hparams(
        self, losses: Sequence[Loss], v: Tensors, step: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Return the part of `difference` by hparams. Backward passes stop at the first use of hparams."""
        ends: list[list[torch.Tensor | None]] = []
        with self._moved(v, step) as to:
            for sign in (-1, 1):
                to(sign)
                total: list[torch.Tensor | None] = [None] * len(self._hparams)
                for loss in losses:
                    total = [_sum(a, b) for a, b in zip(total, self._by_hparams(loss, len(losses)), strict=True)]
                ends.append(total)
        low, high = ends
        return [_sum(b, None if a is None else -a) for a, b in zip(low, high, strict=True)]

    def coarsest_eps(self, losses: Sequence[Loss]) -> float:
        """Return the largest machine epsilon of the tensors that the first loss is computed with.

        Raise a ValueError if the loss differs when it is computed again with the same random numbers.
        """
        seen = [t.dtype for t in self._params]

        def see(t: torch.Tensor) -> torch.Tensor:
            seen.append(t.dtype)
            return t.detach()  # a saved output would keep its graph alive, and so itself

        states = random_states()
        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            first = float(checked("inner", losses[0]()).detach())
        set_random_states(states)
        second = float(checked("inner", losses[0]()).detach())
        set_random_states(states)
        eps = max(torch.finfo(dtype).eps for dtype in seen if dtype.is_floating_point)
        if abs(first - second) > min(sqrt(eps), LOOSEST) * abs(first):
            raise ValueError(
                f"inner returned {first:.6g} and then {second:.6g} for the same weights and random state. It must "
                "compute the same loss each time: fetch the batch before the call, outside of inner, and draw random "
                "numbers only from torch."
            )
        return eps

    @contextmanager
    def _moved(self, v: Tensors, step: torch.Tensor) -> Iterator[Callable[[int], None]]:
        """Yield a function that sets the weights to w + sign · step · v. Restore the weights to the same bits."""
        before, states = [p.detach().clone() for p in self._params], random_states()

        def to(sign: int) -> None:
            set_random_states(states)
            with torch.no_grad():
                for p, old, x in zip(self._params, before, v, strict=True):
                    p.copy_(old).add_(x * step, alpha=sign)  # a product at a time, to save memory

        try:
            yield to
        finally:
            with torch.no_grad():
                for p, old in zip(self._params, before, strict=True):
                    p.copy_(old)

    def _backward(self, name: str, loss: Loss, count: int) -> torch.Tensor:
        value = checked(name, loss())
        value.backward(torch.full_like(value, 1 / count))
        return value.detach()

    def _by_hparams(self, loss: Loss, count: int) -> tuple[torch.Tensor | None, ...]:
        """Return a part of the gradient. The graph is freed before the next loss is computed."""
        return torch.autograd.grad(checked("inner", loss()) / count, self._hparams, allow_unused=True)

    def _take(self, tensors: Tensors) -> list[torch.Tensor | None]:
        grads = [t.grad for t in tensors]
        for t in tensors:
            t.grad = None
        return grads


def checked(name: str, loss: Any) -> torch.Tensor:
    """Return a loss. Raise an error unless it is a scalar with a graph."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"{name}: expected a function that returns a scalar tensor, got {type(loss).__name__}.")
    if loss.ndim:
        raise ValueError(f"{name}: expected a scalar loss, got the shape {tuple(loss.shape)}. Take its mean or sum.")
    if not loss.requires_grad:
        raise ValueError(
            f"{name} returned a loss without a graph. Compute it by the module, outside of torch.no_grad() and "
            "torch.inference_mode(), and do not detach it."
        )
    return loss


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
