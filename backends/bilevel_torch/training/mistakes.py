"""Find steps whose derivative would be wrong without an error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bilevel.dependence import MOST_NAMES, warn
from bilevel.messages import counted, listed
from bilevel.spaces.tree import leaves_with_paths
from bilevel_torch.graph import nodes_of

WRITES = (
    "step: it writes to the state in place without a graph, as optimizers of torch do. Return new tensors, as in "
    "w - rate * gradient, or use bilevel_torch.TrainingStep."
)


@contextmanager
def writing_named() -> Iterator[None]:
    """Raise a ValueError in place of PyTorch's error about a step that writes to the state."""
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad is being used in an in-place operation" in str(error):
            raise ValueError(WRITES) from error
        raise


@contextmanager
def graph_watched(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Watch a step that is differentiated by some tensors.

    Raises:
        ValueError: if it computes a gradient by them without a graph, or writes to them.
    """
    unrecorded: list[bool] = []

    def inspect(_: torch.Tensor) -> None:
        unrecorded.append(not torch.is_grad_enabled())  # inside a backward pass: whether it has create_graph

    hooks = [tensor.register_hook(inspect) for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    try:
        with writing_named():
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if any(unrecorded):
        raise ValueError(
            "step: it computes a gradient by the state without a graph, so the second derivative would be missing. "
            "Pass create_graph=bilevel_torch.recording() to torch.autograd.grad. If the gradient shall count as a "
            "constant, differentiate by a detached copy of the state."
        )
    if versions != [tensor._version for tensor in tensors]:
        raise ValueError(WRITES)


def warn_of_parameters(outputs: Sequence[torch.Tensor]) -> None:
    """Warn if a step depends on parameters of a module, which are outside of its state."""
    leaves = [getattr(node, "variable", None) for node in nodes_of(outputs)]
    found = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.nn.Parameter)]
    if found:
        warn(
            f"step depends on {counted(len(found), 'trainable tensor')} outside of the state and hparams, of shapes "
            f"{listed(found, MOST_NAMES)}. They count as constants. Call the module with the weights in the state, by "
            "torch.func.functional_call or bilevel_torch.TrainingStep. Or freeze them by requires_grad_(False)."
        )


def check_connected(state: Any) -> None:
    """Raise for a state after a step that autograd cannot differentiate.

    Raises:
        TypeError: if derivatives reach a complex tensor, which cotangents do not follow.
        ValueError: if no tensor has a graph.
    """
    tensors = [(path, leaf) for path, leaf in leaves_with_paths(state) if isinstance(leaf, torch.Tensor)]
    for path, tensor in tensors:
        if tensor.is_complex() and tensor.requires_grad:
            raise TypeError(
                f"state{path}: derivatives do not flow through complex tensors. Store torch.view_as_real of it, and "
                "apply torch.view_as_complex inside the step."
            )
    if not any(tensor.requires_grad for _, tensor in tensors):
        raise ValueError(
            "step: the next state has no graph to the state or hparams. Compute it outside of torch.no_grad(), and do "
            "not detach it."
        )
