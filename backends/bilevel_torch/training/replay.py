"""The batches of a DataLoader as a sequence that can be read in any order."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override


def replay(loader: DataLoader[Any], epochs: int = 1) -> Sequence[Any]:
    """Return the batches of a loader, in the order in which a loop over it would see them.

    The order is drawn now, and takes the same random numbers as a loop. Only the indices of the examples stay in
    memory: each access loads a batch again, in this process, by the loader's dataset and ``collate_fn``. So
    ``dataset[i]`` must return the same example each time. Move random augmentation into the training step. A loop
    whose steps draw random numbers has the same orders in later epochs only if the loader has its own ``generator``.

    Args:
        loader: a DataLoader of a dataset with indices.
        epochs: the number of passes.

    Raises:
        TypeError: for a dataset without indices, or an object that is no DataLoader.
        ValueError: for fewer than one epoch.

    >>> import torch, bilevel_torch
    >>> loader = torch.utils.data.DataLoader(torch.arange(5), batch_size=2)
    >>> batches = bilevel_torch.replay(loader, epochs=2)
    >>> len(batches), batches[1], batches[3]
    (6, tensor([2, 3]), tensor([0, 1]))
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"loader: expected a torch.utils.data.DataLoader, got {type(loader).__name__}. A list needs no replay."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"loader: {type(loader.dataset).__name__} is an IterableDataset, which has no indices to read again. Keep "
            "its batches in memory: list(loader)."
        )
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected a number >= 1, got {epochs!r}.")
    return _Replay(loader, [_compact(index) for epoch in range(epochs) for index in _indices(loader, epoch)])


class _Replay(Sequence[Any]):
    """Batches that are loaded when they are read."""

    def __init__(self, loader: DataLoader[Any], indices: list[Any]) -> None:
        self._dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        self._batched = loader.batch_sampler is not None
        self._indices = indices

    @override
    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    @override
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        chosen = self._indices[index]
        if not self._batched:
            return self._collate(self._dataset[chosen])
        chosen = list(chosen)
        if hasattr(self._dataset, "__getitems__"):
            return self._collate(self._dataset.__getitems__(chosen))
        return self._collate([self._dataset[i] for i in chosen])


class _Indices(Dataset[Any]):
    """A dataset whose examples are their indices."""

    @override
    def __getitem__(self, index: Any) -> Any:
        return index


def _indices(loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
    """Yield the indices of each batch, or of each example of a loader without batches.

    A DataLoader draws one random number for the seeds of its workers in each epoch, before the order. With persistent
    workers, it draws one only in the first epoch.
    """
    batched = loader.batch_sampler is not None
    if epoch and loader.persistent_workers:
        indices: Any = loader.batch_sampler if batched else loader.sampler
        return iter(indices)
    how: dict[str, Any] = (
        {"batch_sampler": loader.batch_sampler} if batched else {"batch_size": None, "sampler": loader.sampler}
    )
    return iter(DataLoader(_Indices(), collate_fn=_same, generator=loader.generator, **how))


def _compact(index: Any) -> Any:
    """Return a list of integers as an array, which takes a fifth of the memory."""
    return array("q", index) if isinstance(index, list) and all(type(i) is int for i in index) else index


def _same(index: Any) -> Any:
    return index
