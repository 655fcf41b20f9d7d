"""Training steps in torch: values without a graph, and parts of a run with a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from typing_extensions import override

from bilevel.backend import Backend
from bilevel.spaces.tree import leaves, tree_map
from bilevel.steps import Pull, Pulled, Steps
from bilevel.validation import check_dtypes, check_like
from bilevel_torch.autograd import check_untransformed, grad, no_grad_no_autocast
from bilevel_torch.training.recording import without_graph


class TorchSteps(Steps):
    """Steps that autograd differentiates."""

    def __init__(self, backend: Backend, step: Callable[..., Any]) -> None:
        self.backend = backend
        self.step = step

    @override
    def advance(self, state: Any, hparams: Any, batches: Sequence[Any]) -> Any:
        check_untransformed()
        hparams = tree_map(torch.Tensor.detach, hparams)
        end = tree_map(_copied, state)  # a step may write to its arguments
        with torch.enable_grad(), without_graph():
            for batch in batches:
                end = self.step(tree_map(_leaf, end), hparams, batch)
        self._check(state, end)
        return tree_map(_detached, end)

    @override
    def record(self, state: Any, hparams: Any, batches: Sequence[Any]) -> tuple[Any, Pull]:
        check_untransformed()
        hparams = tree_map(lambda t: t.detach().requires_grad_(), hparams)
        first = end = tree_map(lambda leaf: _leaf(_copied(leaf)), state)
        inputs = [*_floating(first), *leaves(hparams)]
        with torch.enable_grad():
            for batch in batches:
                end = self.step(end, hparams, batch)
        self._check(state, end)
        outputs = _floating(end)
        count = len(outputs)

        def pull(cotangent: list[Any], many: bool) -> Pulled:
            return rows(cotangent) if many else one(cotangent)

        def one(cotangent: list[Any], again: bool = False) -> Pulled:
            varying = [i for i, t in enumerate(outputs) if t.requires_grad]
            with no_grad_no_autocast(outputs):
                grads = grad([outputs[i] for i in varying], inputs, [cotangent[i] for i in varying], retain_graph=again)
            moved = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads[:count], strict=False)]
            return Pulled(moved, grads[count:])

        def rows(cotangents: list[Any]) -> Pulled:
            used: list[bool] = []

            def row(*cotangent: torch.Tensor) -> list[torch.Tensor]:
                moved, cross = one(list(cotangent), again=True)
                used[:] = [c is not None for c in cross]
                return [*moved, *(c for c in cross if c is not None)]

            found = self.backend.by_rows.batched(row, *cotangents)
            cross = iter(found[count:])
            return Pulled(found[:count], [next(cross) if flag else None for flag in used])

        return tree_map(_detached, end), pull

    def _check(self, state: Any, after: Any) -> None:
        """Raise unless steps have kept the structure, shapes and dtypes of the state."""
        before, new = leaves(state), leaves(after)
        if len(before) != len(new) or any(map(_differ, before, new)):
            new, before = (tree_map(lambda a: a if isinstance(a, torch.Tensor) else None, t) for t in (after, state))
            check_like(self.backend, "step", new, "state", before)
            check_dtypes(self.backend, "step", new, "state", before)
            raise ValueError("step: expected a state with the structure of the state that it was called with.")

    @override
    def graph_bytes(self, state: Any, hparams: Any, batch: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.record(state, hparams, [batch])
        return sum(sizes.values())

    @override
    def random_state(self) -> Any:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])]

    @override
    def set_random_state(self, state: Any) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state_all(state[1:])


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _leaf(leaf: Any) -> Any:
    """Return a tensor without a graph, by which a step can differentiate."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.is_floating_point())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _floating(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _differ(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.shape != after.shape or before.dtype != after.dtype
    return isinstance(before, torch.Tensor) != isinstance(after, torch.Tensor)
