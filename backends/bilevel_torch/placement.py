"""Place a hypergradient into ``.grad``."""

import torch

from bilevel.results import Hypergradient
from bilevel.spaces.tree import leaves, leaves_with_paths
from bilevel.validation import check_trees
from bilevel_torch.autograd import LEAF
from bilevel_torch.backend import TorchBackend
from bilevel_torch.graph import nodes_of
from bilevel_torch.trees import TensorTree, tree_of


def place_grad(hg: Hypergradient, hparams: TensorTree, *, accumulate: bool = True) -> None:
    """Add ``hg.grad`` to the ``.grad`` of hparams, as ``loss.backward()`` adds a gradient.

    Use it for the result of `bilevel.hypergradient`, for example with ``Unrolled``. If hparams are computed from other
    tensors, these receive the gradient. Hooks on hparams fire.

    Args:
        hg: the result of a hypergradient.
        hparams: tensors that require gradients, with the structure and shapes of ``hg.grad``: a tensor, a list, a dict,
            or an iterable such as ``module.named_parameters()``.
        accumulate: True: add to what is in ``.grad``. False: replace it. If an error is raised, ``.grad`` stays.

    Raises:
        TypeError, ValueError: if hg is not a `Hypergradient`, or hparams do not fit it; the message names the leaf.

    >>> import torch, bilevel as bl, bilevel_torch
    >>> problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())
    >>> start = torch.tensor([3.0], requires_grad=True)
    >>> hg = bl.hypergradient(problem, torch.tensor([3.0]), start)
    >>> bilevel_torch.place_grad(hg, start)
    >>> start.grad
    tensor([6.])
    """
    if not isinstance(hg, Hypergradient):
        raise TypeError(f"hg: expected the result of bl.hypergradient, got {type(hg).__name__}.")
    h, backend = tree_of("hparams", hparams), TorchBackend()
    check_trees(backend, {"hg.grad": hg.grad, "hparams": h}, {"hg.grad": "hparams"})
    for path, leaf in leaves_with_paths(h, "hparams"):
        if not leaf.requires_grad:
            raise ValueError(f"{path} does not require a gradient: call requires_grad_() on it.")
    add_to_grad(h, hg.grad, accumulate)


def add_to_grad(hparams: object, grads: object, accumulate: bool) -> None:
    """Add gradients to the ``.grad`` of hparams, or of the tensors that they are computed from, or replace it."""
    tensors = leaves(hparams)
    replaced = [] if accumulate else [node.variable for node in nodes_of(tensors) if node.name() == LEAF]  # pyright: ignore
    before = [(t, t.grad) for t in replaced]
    try:
        for t in replaced:
            t.grad = None
        torch.autograd.backward(tensors, leaves(grads), retain_graph=True)
    except BaseException:
        for t, grad in before:
            t.grad = grad
        raise
