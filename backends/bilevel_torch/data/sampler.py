"""Draw training data in proportion to their weights."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from bilevel.options import check_int, check_real
from bilevel_torch.data.weights import DataWeights, check_integers


class WeightedSampler(Sampler[int]):
    """Draw examples in proportion to their present weights, for a `torch.utils.data.DataLoader`.

    Example i has the probability

        q = (1 − uniform) w / (sum of all w) + uniform / N

    for each draw. Multiply the losses of a batch by `loss_weights`, w / (N q), and take the mean. It is an unbiased
    estimate of the mean of w times the loss over all N examples (importance sampling). Its derivative by the scores is
    unbiased too. Examples of little weight are rarely drawn, and no loss weight is more than w / ``uniform``.

    The probabilities are computed when an iteration starts, and stay until the next one. So batches that a loader
    fetches early have the right loss weights. The sampler sees new weights after ``num_samples`` draws.

    Args:
        weights: the weights. A module of features needs the transform "sigmoid", because the softmax over all examples
            differs from the softmax over a batch.
        items: the number of the source of each of the N examples, for a table. Or the features of all N examples.
        num_samples: the number of draws of an iteration, with replacement.
        uniform: the part of the draws that does not follow the weights, > 0 and <= 1. It keeps examples of weight 0 in
            view, so that their weights can rise again.
        generator: the source of random numbers. None: the default of torch.

    Raises:
        TypeError, ValueError: for invalid arguments; the message names the argument.

    >>> import torch
    >>> from bilevel_torch.data import DataWeights, WeightedSampler
    >>> source = torch.tensor([0, 0, 0, 1])  # of each example
    >>> weights = DataWeights(2, sizes=[3, 1])
    >>> sampler = WeightedSampler(weights, source, num_samples=6)
    >>> batch = torch.tensor(list(sampler))  # usually by DataLoader(dataset, batch_size, sampler=sampler)
    >>> sampler.loss_weights(batch).detach()
    tensor([1., 1., 1., 1., 1., 1.])
    """

    def __init__(
        self,
        weights: DataWeights,
        items: torch.Tensor,
        num_samples: int,
        *,
        uniform: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        self.num_samples, self.uniform = num_samples, uniform
        check_int(self, "num_samples", least=1)
        check_real(self, "uniform", above=0)
        if uniform > 1:
            raise ValueError(f"WeightedSampler.uniform: expected a part from 0 to 1, got {uniform!r}.")
        if not isinstance(weights, DataWeights):
            raise TypeError(f"weights: expected DataWeights, got {type(weights).__name__}.")
        if not isinstance(items, torch.Tensor) or not items.ndim or not len(items):
            raise TypeError(
                "items: expected a tensor with the number of the source, or the features, of each of one or more "
                f"examples, got {type(items).__name__}."
            )
        if isinstance(weights.scores, torch.nn.Module) and weights.transform == "softmax":
            raise ValueError(
                "weights: a module with a softmax over the batch has no weights of single examples. Construct "
                'DataWeights(module, "sigmoid").'
            )
        self._weights, self._items, self._generator = weights, items, generator
        self._probabilities = self.probabilities()

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        self._probabilities = self.probabilities()
        sums = self._probabilities.cumsum(0)
        points = torch.rand(self.num_samples, dtype=torch.float64, generator=self._generator) * sums[-1]
        yield from torch.searchsorted(sums, points, right=True).clip(max=len(sums) - 1).tolist()

    @torch.no_grad()
    def probabilities(self) -> torch.Tensor:
        """Return the probability of each example by the present weights, of shape (N,), in float64 on the CPU."""
        w = self._weights(self._items).double().cpu()
        if w.ndim != 1:
            raise ValueError(f"items: expected one number or row of features for each example, got {tuple(w.shape)}.")
        total = w.sum()
        if not bool(total.isfinite() and total > 0):
            raise ValueError(
                f"weights: the sum of the weights of all examples is {float(total)}. A score may be nan, or too large."
            )
        return (1 - self.uniform) * w / total + self.uniform / len(w)

    def loss_weights(self, indices: torch.Tensor) -> torch.Tensor:
        """Return w / (N q) of some examples, with a graph to the scores.

        Args:
            indices: the numbers of examples that this iteration of the sampler has drawn, of any shape.

        Returns:
            Factors for the losses of these examples, in the shape and on the device of the indices.

        Raises:
            TypeError, IndexError: if the indices are no numbers of examples.
        """
        check_integers("indices", indices, "numbers of examples")
        indices, count = indices.long(), len(self._probabilities)
        if bool(((indices < 0) | (indices >= count)).any()):
            raise IndexError(
                f"indices: expected numbers of examples, from 0 to {count - 1}, got numbers from {int(indices.min())} "
                f"to {int(indices.max())}."
            )
        at = indices.to(self._items.device)
        w = self._weights(self._items[at.reshape(-1)]).reshape(indices.shape)
        scale = 1 / (count * self._probabilities[indices.cpu()])
        return (w * scale.to(w)).to(indices.device)
