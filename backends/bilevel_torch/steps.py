"""Training steps in torch: values without a graph, and parts of a run with a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from bilevel.backend import Backend
from bilevel.dependence import warn_of_cut
from bilevel.spaces.tree import leaves, leaves_with_paths, tree_map
from bilevel.steps import PLAIN, Pull, Pulled, Steps, floats_of
from bilevel.validation import check_dtypes, check_like
from bilevel_torch.autograd import check_untransformed, grad, solver_mode
from bilevel_torch.graph import check_compiled, nodes_of
from bilevel_torch.isolation import random_states, set_random_states
from bilevel_torch.training.mistakes import check_connected, graph_watched, warn_of_parameters, writing_named
from bilevel_torch.training.recording import without_graph
from bilevel_torch.training.step import TrainingStep


class TorchSteps(Steps):
    """Steps that autograd differentiates."""

    def __init__(self, backend: Backend, step: Callable[..., Any]) -> None:
        self.backend = backend
        self.step = step
        self._checked = False  # whether the first recorded step has passed the checks that are made only once

    @override
    def start(self, state: Any) -> Any:
        check_untransformed()
        for path, leaf in leaves_with_paths(state):
            if isinstance(leaf, torch.Generator | np.random.Generator | np.random.RandomState):
                raise TypeError(
                    f"state{path}: a {type(leaf).__name__} cannot be stored with the states of a run. Draw from the "
                    "global generators of torch, which are restored when steps are computed again."
                )
        return state

    @override
    def advance(self, state: Any, hparams: Any, batches: Sequence[Any]) -> Any:
        hparams = tree_map(torch.Tensor.detach, hparams)
        end = tree_map(_copied, state)  # a step may write to its arguments
        with torch.enable_grad(), without_graph(), writing_named():
            for batch in batches:
                end = self.step(tree_map(_leaf, end), hparams, batch)
        self._check(state, end)
        return tree_map(_detached, end)

    @override
    def record(self, state: Any, hparams: Any, batches: Sequence[Any]) -> tuple[Any, Pull]:
        hparams = tree_map(lambda t: t.detach().requires_grad_(), hparams)
        first = tree_map(lambda leaf: _leaf(_copied(leaf)), state)
        start = floats_of(self.backend, first)
        inputs = [*start, *leaves(hparams)]
        with torch.enable_grad(), graph_watched(start):
            end = self.step(first, hparams, batches[0])
        if not self._checked:
            self._check(state, end)
            if not isinstance(self.step, TrainingStep):  # its frozen parameters are constants on purpose
                check_compiled("step", nodes_of(floats_of(self.backend, end)))
                warn_of_parameters(floats_of(self.backend, end))
        self._checked = True
        with torch.enable_grad():
            for batch in batches[1:]:
                end = self.step(end, hparams, batch)
        self._check(state, end)
        outputs = floats_of(self.backend, end)
        check_connected(end)
        count = len(start)  # inputs are the floats of the state, and then hparams

        def pull(cotangent: list[Any], many: bool) -> Pulled:
            return rows(cotangent) if many else one(cotangent)

        def one(cotangent: list[Any], keep_graph: bool = False) -> Pulled:
            varying = [i for i, t in enumerate(outputs) if t.requires_grad]
            with solver_mode(outputs):
                grads = grad(
                    [outputs[i] for i in varying], inputs, [cotangent[i] for i in varying], retain_graph=keep_graph
                )
            if all(g is None for g in grads[:count]):
                warn_of_cut()
            moved = [torch.zeros_like(t) if g is None else g for t, g in zip(start, grads[:count], strict=True)]
            return Pulled(moved, grads[count:])

        def rows(cotangents: list[Any]) -> Pulled:
            used: list[bool] = []

            def row(*cotangent: torch.Tensor) -> list[torch.Tensor]:
                moved, cross = one(list(cotangent), keep_graph=True)
                used[:] = [c is not None for c in cross]
                return [*moved, *(c for c in cross if c is not None)]

            found = self.backend.by_rows.batched(row, *cotangents)
            cross = iter(found[count:])
            return Pulled(found[:count], [next(cross) if flag else None for flag in used])

        return tree_map(_detached, end), pull

    def _check(self, state: Any, after: Any) -> None:
        """Raise unless steps have kept the structure, shapes and dtypes of the state."""
        if _kinds(after) != _kinds(state):
            new, before = (tree_map(lambda a: a if isinstance(a, torch.Tensor) else None, t) for t in (after, state))
            check_like(self.backend, "step", new, "state", before)
            check_dtypes(self.backend, "step", new, "state", before)
            raise ValueError(
                "step: expected a state with the structure of the state that it was called with. Only tensors, numbers "
                f"and strings may change. It was called with {_outline(state)} and returned {_outline(after)}."
            )

    @override
    def graph_bytes(self, state: Any, hparams: Any, batch: Any) -> int:
        sizes: dict[int, int] = {}
        saved: list[list[torch.Tensor]] = []

        def pack(tensor: torch.Tensor) -> list[torch.Tensor]:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            saved.append([tensor])
            return saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder[0]):
            self.record(state, hparams, [batch])
        for holder in saved:
            holder.clear()  # else a saved output keeps its graph alive, and so itself
        return sum(sizes.values())

    @override
    def random_state(self) -> Any:
        return random_states()

    @override
    def set_random_state(self, state: Any) -> None:
        set_random_states(state)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _leaf(leaf: Any) -> Any:
    """Return a tensor without a graph, by which a step can differentiate."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.is_floating_point())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _kinds(tree: Any) -> Any:
    """Return the parts of a state that a step must keep: structure, shapes, dtypes, and objects of unknown types."""
    if isinstance(tree, dict):
        return {key: _kinds(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree), [_kinds(child) for child in tree]
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.dtype
    return "plain" if isinstance(tree, PLAIN) else ("object", id(tree))


def _outline(tree: Any) -> str:
    return repr(tree_map(lambda leaf: leaf if isinstance(leaf, PLAIN) else type(leaf).__name__, tree))
