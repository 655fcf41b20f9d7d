"""Check a hypergradient from two losses of a training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from bilevel.diagnosis import Diagnosis
from bilevel.diagnosis import diagnose as diagnose_problem
from bilevel.hypergradient import SolverSpec
from bilevel.problems.problem import Problem
from bilevel.spaces.tree import leaves, leaves_with_paths
from bilevel_torch.backend import TorchBackend
from bilevel_torch.trees import TensorTree, prune, tree_of


def diagnose(
    inner_loss: Callable[[], object],
    outer_loss: Callable[[], object],
    params: TensorTree,
    hparams: TensorTree,
    *,
    solver: SolverSpec = "cg",
    backend: TorchBackend | None = None,
) -> Diagnosis:
    """Return a report on a hypergradient, as `bilevel.diagnose` does, from functions that compute the two losses.

    The losses may run modules of any library, since they take no arguments and use your tensors as they are. The report
    needs the losses at other values of params and hparams. For these evaluations, the tensors get other contents, in
    float64 if the losses work with it. After the call, or an error, they have their old memory, ``.grad`` and hooks.
    The buffers of modules and the random states are restored too.

    Args:
        inner_loss: a function without arguments that returns L, with its graph, as you would pass it to
            `bilevel_torch.backward`. It must compute everything that depends on params or hparams.
        outer_loss: the same for F.
        params, hparams, solver, backend: as in `bilevel_torch.backward`. Tensors that require no gradient are left out
            of params. hparams must be leaf tensors. If the losses use a function of other tensors, pass the others.

    Raises:
        TypeError, ValueError, RuntimeError: as in `bilevel_torch.backward`.

    >>> import torch, bilevel_torch
    >>> w, decay = torch.tensor([0.5], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    >>> report = bilevel_torch.diagnose(
    ...     lambda: ((w - 1) ** 2).sum() + (decay * w**2).sum(), lambda: ((w - 2) ** 2).sum(), w, decay
    ... )
    >>> report.ok
    True
    """
    for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
        if not callable(loss):
            raise TypeError(
                f"{name}: expected a function without arguments that computes the loss, got {type(loss).__name__}. "
                f"bilevel_torch.diagnose evaluates it at other values: pass lambda: ..., or the function itself."
            )
        _check_call(name, loss)
    w, h = _trainable(tree_of("params", params)), tree_of("hparams", hparams)
    for name, tree in (("params", w), ("hparams", h)):
        _check_leaves(name, tree)
    problem = Problem(_Closure(inner_loss), _Closure(outer_loss))
    return diagnose_problem(problem, w, h, solver=solver, backend=backend or TorchBackend())


@dataclass(frozen=True)
class _Closure:
    """A loss that reads its arguments from a closure."""

    loss: Callable[[], object]

    def __call__(self, params: object, hparams: object) -> object:
        try:
            return self.loss()
        except StopIteration as error:
            raise RuntimeError(
                "A loss has raised StopIteration. bilevel_torch.diagnose evaluates it several times, for the same "
                "batch. Take the batch from the iterator outside of the loss."
            ) from error


def _check_call(name: str, loss: Callable[[], object]) -> None:
    try:
        signature(loss).bind()
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a function without arguments, as in lambda: loss(net, x, y): {error}."
        ) from None
    except ValueError:  # some functions of C have no signature
        return


def _trainable(tree: Any) -> Any:
    """Return the tree without the frozen tensors; the tree itself if all are frozen, for an error."""
    frozen = [isinstance(leaf, torch.Tensor) and not leaf.requires_grad for leaf in leaves(tree)]
    return tree if all(frozen) else prune(tree, frozen)


def _check_leaves(name: str, tree: object) -> None:
    for path, leaf in leaves_with_paths(tree, name):
        if not isinstance(leaf, torch.Tensor):
            continue  # bl.diagnose raises the error
        if not leaf.requires_grad:
            raise ValueError(f"{path} does not require a gradient, so the losses have no graph to it.")
        if not leaf.is_leaf:
            raise ValueError(
                f"{path} is computed from other tensors, and the losses would compute it again. Pass the other tensors."
            )
