"""Keep the sources of examples, or of tokens, in batches of any collator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class KeepColumn:
    """A collator that adds one column of integers to the batches of another collator.

    The column has an integer for each example, or a list with an integer for each token. Lists are padded with 0 like
    the tokens, or concatenated if the other collator packs all examples into one row.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], column: str) -> None:
        self.collator, self.column = collator, column

    def __call__(self, examples: Sequence[Any]) -> Any:
        column = [example.get(self.column) for example in examples]
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in examples])
        if all(numbers is None for numbers in column):  # validation data
            return batch
        if any(numbers is None for numbers in column):
            raise ValueError(f"Some examples of a batch have no {self.column!r}. Give it to all examples, or to none.")
        batch[self.column] = _stacked([_integers(numbers, self.column) for numbers in column], batch, self.column)
        return batch


def _integers(numbers: Any, name: str) -> torch.Tensor:
    try:
        found = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"{name!r}: expected integers, such as the number of the source, got {numbers!r:.60}.")
    return found


def _stacked(column: list[torch.Tensor], batch: Any, name: str) -> torch.Tensor:
    if all(numbers.ndim == 0 for numbers in column):
        return torch.stack(column)
    rows, length = batch["input_ids"].shape
    counts = [len(numbers) for numbers in column]
    if rows == 1 and sum(counts) == length:
        return torch.cat(column)[None]
    if rows == len(column) and "attention_mask" in batch and batch["attention_mask"].sum(1).tolist() == counts:
        padded = torch.zeros(rows, length, dtype=torch.long)
        padded[batch["attention_mask"].bool()] = torch.cat(column)
        return padded
    raise ValueError(
        f"{name!r}: got {counts} integers for tokens of the shape {(rows, length)}. Give each token one, and cut texts "
        "that are too long before."
    )
