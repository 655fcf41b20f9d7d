"""Data for an objective in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from bilevel.messages import listed
from bilevel.spaces.array import Args, Number
from bilevel.spaces.tree import leaves_with_paths, tree_map

Reduction = Literal["mean", "sum"]


class MicroBatches(NamedTuple):
    """Data for one objective in parts: the mean, or the sum, of the objective over all micro-batches.

    Pass it as ``inner_args`` or ``outer_args``. Each value, gradient and Hessian-vector product is a pass over all
    micro-batches. It is exact, with the memory of one micro-batch, and every solver accepts it. A product computes each
    micro-batch's gradient again, because no micro-batch stays in memory. (A list of tuples as ``inner_args`` has
    another meaning: one batch for each step of ``neumann`` and ``unrolled``.)

    Under "mean", the weights of the micro-batches are their numbers of examples, divided by the total. So an objective
    that is a mean over the examples plus a penalty has the same value as on all data at once. Under "sum", a penalty
    inside the objective counts once per micro-batch.

    Attributes:
        data: a list of micro-batches, or a loader that can be iterated again, such as a torch DataLoader. In JAX, only
            a list. A micro-batch is a tuple or list of arguments of the objective; another value is the only argument.
            With ``size``: one tuple of whole arrays of n examples, shape (n, ...).
        size: the number of examples in a micro-batch, if ``data`` is a tuple of whole arrays. The last micro-batch may
            have fewer.
        reduction: "mean" or "sum".
        weights: one number for each micro-batch, its factor in the sum or the weighted mean. None: for "mean", the
            number of examples, which is the length of the first axis of the arrays; for "sum", one.

    >>> import numpy as np, bilevel as bl
    >>> X, y = np.random.default_rng(0).standard_normal((10, 3)), np.arange(10.0)
    >>> problem, w, h = bl.problems.ridge(), np.ones(3), np.zeros(3)
    >>> whole = bl.hypergradient(problem, w, h, inner_args=(X, y), outer_args=(X, y), on_failure="ignore")
    >>> parts = bl.MicroBatches((X, y), size=4)
    >>> same = bl.hypergradient(problem, w, h, inner_args=parts, outer_args=parts, on_failure="ignore")
    >>> np.allclose(same.grad, whole.grad)
    True
    """

    data: Any
    size: int | None = None
    reduction: Reduction = "mean"
    weights: Sequence[Number] | None = None

    def first(self) -> Args:
        """Return the first micro-batch."""
        return next(self.parts())[0]

    def parts(self) -> Iterator[tuple[Args, Number]]:
        """Yield the micro-batches with their weights.

        Raises:
            ValueError: if there is no micro-batch, if the number of examples in one is not clear, or if the number of
                weights is another.
        """
        count = 0
        for args in self._slices() if self.size else map(_as_args, self.data):
            yield args, self.weight(count, args)
            count += 1
        if not count or (self.weights is not None and count != len(self.weights)):
            weights = "" if self.weights is None else f" and {len(self.weights)} weights"
            raise ValueError(f"MicroBatches: the data have {count} micro-batches{weights}.")

    def weight(self, i: int, args: Args) -> Number:
        """Return the weight of micro-batch i."""
        if self.weights is not None:
            return self.weights[i] if i < len(self.weights) else 0.0
        return 1 if self.reduction == "sum" else examples(args)

    def _slices(self) -> Iterator[Args]:
        size: Any = self.size
        for start in range(0, examples(self.data), size):
            yield tree_map(lambda a, start=start: a[start : start + size] if axes(a) else a, self.data)


def axes(leaf: object) -> int:
    """Return the number of axes of an array; 0 for other values."""
    return len(getattr(leaf, "shape", ()))


def examples(args: object) -> int:
    """Return the length of the first axis of the arrays. Raise a ValueError if they differ, or if there is no array."""
    lengths = {path: leaf.shape[0] for path, leaf in leaves_with_paths(args) if axes(leaf)}
    if len(set(lengths.values())) != 1:
        found = listed([f"{path}: {length}" for path, length in lengths.items()]) or "none"
        raise ValueError(
            "MicroBatches: the number of examples in a micro-batch is the length of the first axis of its arrays, but "
            f"the lengths are {found}. Pass weights=[...] with a list or a loader, or close over other arrays."
        )
    return next(iter(lengths.values()))


def _as_args(batch: object) -> Args:
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)
