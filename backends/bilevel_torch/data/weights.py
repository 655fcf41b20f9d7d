"""Weights of training data, as hyperparameters."""

from collections.abc import Sequence
from math import log
from numbers import Integral
from typing import Any

import torch

from bilevel.options import check_choice


class DataWeights(torch.nn.Module):
    """Learnable, non-negative weights of the losses of training data.

    Each source or example has a score s, and its weight w is a function of the scores:

        "softmax": w = exp(s) / mean of exp(s), so that the mean weight is 1
        "sigmoid": w = 2 / (1 + exp(−s)), from 0 to 2

    All weights are 1 where all scores are 0. So a run starts as if it had no weights. Multiply the losses of a batch by
    the weights, and take the mean. Pass ``parameters()`` as the hparams of `bilevel_torch.backward` or
    `bilevel_torch.FirstOrder`. ``state_dict()`` and ``to(device)`` work as for any module.

    Take the softmax for sources: only the ratios of the weights matter then, and they cannot all become 0. It is the
    choice of ScaleBiO (Pan et al., arXiv 2406.19976). Take the sigmoid for examples: only the scores of the batch
    receive a gradient that is not zero. A network of features is a Meta-Weight-Net (Shu et al., NeurIPS 2019).

    Args:
        scores: the number n of sources or examples, for a table of n scores that start at 0. Or a module that maps
            features of a batch, of shape (batch, ...), to scores of shape (batch,) or (batch, 1).
        transform: "softmax" or "sigmoid". With a module, the mean of the softmax is over the batch.
        sizes: the numbers of examples of the n sources, for the softmax of a table. Then the mean weight over the
            examples is 1. None: all sources have the same size.

    Raises:
        TypeError, ValueError: for invalid arguments; the message names the argument.

    >>> import torch
    >>> from bilevel_torch.data import DataWeights
    >>> weights = DataWeights(3)
    >>> source = torch.tensor([0, 2, 2, 1])  # of each example of the batch
    >>> losses = torch.tensor([1.0, 2.0, 2.0, 3.0])
    >>> (weights(source) * losses).mean()
    tensor(2., grad_fn=<MeanBackward0>)
    """

    log_shares: torch.Tensor | None
    scores: torch.nn.Module | torch.nn.Parameter

    def __init__(
        self, scores: int | torch.nn.Module, transform: str = "softmax", *, sizes: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_choice("transform", transform, ["softmax", "sigmoid"])
        self.transform = transform
        self.scores = scores if isinstance(scores, torch.nn.Module) else _table(scores)
        shares = None if sizes is None else _log_shares(sizes, self.scores, transform)
        self.register_buffer("log_shares", shares, persistent=False)

    def forward(self, items: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights of a batch.

        Args:
            items: for a table, the numbers of the sources or examples, integers of any shape. For a module, its
                features. None: return the n weights of a table.

        Returns:
            Weights in the shape of the numbers, or of shape (batch,) for a module.

        Raises:
            TypeError, ValueError, IndexError: if the items do not fit.
        """
        if isinstance(self.scores, torch.nn.Module):
            if items is None:
                raise ValueError("items: the weights of a module need features. Pass a tensor of them.")
            every = chosen = _scores(self.scores, items)
        else:
            every = self.scores
            chosen = every if items is None else _rows(every, items)
        if self.transform == "sigmoid":
            return 2 * chosen.sigmoid()
        shares = -log(len(every)) if self.log_shares is None else self.log_shares
        return (chosen - (every + shares).logsumexp(0)).exp()

    def extra_repr(self) -> str:
        """Return the size of the table, and the transform."""
        size = "" if isinstance(self.scores, torch.nn.Module) else f"{len(self.scores)}, "
        return f"{size}{self.transform!r}"


def _table(number: object) -> torch.nn.Parameter:
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(
            "scores: expected the number of sources or examples, or a module that maps features to scores, got "
            f"{type(number).__name__}."
        )
    if number < 1:
        raise ValueError(f"scores: expected at least one source or example, got {number}.")
    return torch.nn.Parameter(torch.zeros(int(number)))


def _log_shares(sizes: Sequence[float], scores: torch.nn.Module | torch.nn.Parameter, transform: str) -> torch.Tensor:
    if isinstance(scores, torch.nn.Module) or transform != "softmax":
        raise ValueError("sizes: only the softmax of a table has a mean over sources. Leave sizes out.")
    try:
        given = torch.as_tensor(sizes, dtype=torch.float64)
    except (TypeError, ValueError):
        given = torch.zeros(0, dtype=torch.float64)  # which raises below
    if given.shape != scores.shape or not bool((given > 0).all() and given.isfinite().all()):
        raise ValueError(f"sizes: expected {len(scores)} positive numbers, one for each source, got {sizes!r:.100}.")
    return (given / given.sum()).log().to(scores.dtype)


def check_integers(name: str, value: Any, expected: str) -> None:
    """Raise a TypeError unless a value is a tensor of integers."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        got = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {expected}, got {got}.")


def _rows(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return the scores of some items. Negative numbers raise an error, as they are usually labels of padding."""
    check_integers("items", items, f"integers from 0 to {len(scores) - 1}")
    try:
        return torch.nn.functional.embedding(items.long(), scores[:, None])[..., 0]
    except IndexError:
        raise IndexError(
            f"items: expected integers from 0 to {len(scores) - 1}, got numbers from {int(items.min())} to "
            f"{int(items.max())}."
        ) from None


def _scores(module: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    scores = module(features)
    if not len(features):
        raise ValueError("items: the batch has no examples.")
    if scores.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"scores: the module returned the shape {tuple(scores.shape)} for {len(features)} examples. Return one "
            "score for each example."
        )
    return scores.reshape(-1)
