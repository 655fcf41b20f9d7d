"""The row numbers of cross-validation folds, and the rows of data by these numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bilevel.messages import listed
from bilevel.micro_batches import MicroBatches, axes
from bilevel.spaces.array import Args
from bilevel.spaces.tree import leaves_with_paths, tree_map


class Folds:
    """Pairs of arrays of row numbers: the rows to train on, and the rows that are held out.

    Folds of the same numbers are equal and have the same hash, so JAX compiles once for all of them.

    Raises:
        TypeError: if the folds are not pairs of arrays of integers.
        ValueError: if there is no fold, if one is empty, has negative numbers, or holds out a row that it trains on.
    """

    def __init__(self, folds: Iterable[Any]) -> None:
        if isinstance(folds, int) or not isinstance(folds, Iterable):
            raise TypeError(
                f"folds: expected pairs (train, test) of arrays of row numbers, got {type(folds).__name__}. Pass "
                "sklearn.model_selection.KFold(5).split(X), for example."
            )
        pairs = [_pair(i, fold) for i, fold in enumerate(folds)]
        if not pairs:
            raise ValueError("folds: there is no fold. A generator of folds can be read only once: put it in a list.")
        self.train: list[np.ndarray] = [train for train, _ in pairs]
        self.test: list[np.ndarray] = [test for _, test in pairs]
        self.needed = 1 + max(int(rows.max()) for rows in self.train + self.test)
        self._key = tuple(rows.tobytes() for rows in self.train + self.test)
        self._hash = hash(self._key)

    def __len__(self) -> int:
        return len(self.train)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folds) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<{len(self)} folds of {self.needed} rows>"

    def training(self, args: Args) -> list[Args]:
        """Return the arguments with the training rows of their arrays, for each fold."""
        return self._rows(args, self.train)

    def held_out(self, args: Args) -> list[Args]:
        """Return the arguments with the rows that are held out, for each fold."""
        return self._rows(args, self.test)

    def _rows(self, args: Args, parts: Sequence[np.ndarray]) -> list[Args]:
        if isinstance(args, MicroBatches):
            raise TypeError("k_fold takes all rows in whole arrays, as in inner_args=(X, y), and no bl.MicroBatches.")
        lengths = {path: leaf.shape[0] for path, leaf in leaves_with_paths(args) if axes(leaf)}
        if len(set(lengths.values())) > 1:
            found = listed([f"args{path} has {length}" for path, length in lengths.items()])
            raise ValueError(
                f"k_fold: the arrays of the arguments must have the same number of rows, but {found}. Close over "
                "arrays that do not belong to rows."
            )
        if lengths and next(iter(lengths.values())) < self.needed:
            raise ValueError(
                f"k_fold: the folds need {self.needed} rows, but the arrays have {next(iter(lengths.values()))}. "
                "Pass all rows, not the rows of one fold."
            )
        return [tree_map(_taker(rows), args) for rows in parts]


class SplitRows:
    """The rows of all folds of fixed data, in place of `Folds`, for searches that use them many times.

    Args:
        folds: the row numbers.
        args: the arrays of all rows.
        prepare: called with the arguments of each training set, for example to convert their formats.
    """

    def __init__(self, folds: Folds, args: Args, prepare: Callable[[Args], Args] = lambda args: args) -> None:
        self._training = [prepare(part) for part in folds.training(args)]
        self._held_out = folds.held_out(args)

    def __len__(self) -> int:
        return len(self._training)

    def training(self, args: Args = ()) -> list[Args]:
        """Return the arguments of each training set. ``args`` is not used."""
        return self._training

    def held_out(self, args: Args = ()) -> list[Args]:
        """Return the arguments with the rows that are held out, for each fold. ``args`` is not used."""
        return self._held_out


def _taker(rows: np.ndarray) -> Callable[[Any], Any]:
    def take(leaf: Any) -> Any:
        if not axes(leaf):
            return leaf
        return (leaf.tocsr() if hasattr(leaf, "tocsr") else leaf)[rows]  # not all formats of SciPy have rows

    return take


def _pair(i: int, fold: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the two arrays of a fold, checked."""
    try:
        train, test = (np.asarray(rows) for rows in fold)
    except (TypeError, ValueError) as error:
        raise TypeError(f"folds[{i}]: expected a pair (train, test) of arrays of row numbers, got {fold!r}.") from error
    for name, rows in (("train", train), ("test", test)):
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(
                f"folds[{i}]: {name} must be a vector of row numbers, got {rows.dtype} of shape {rows.shape}. "
                "Convert a mask by np.flatnonzero(mask)."
            )
        if not rows.size:
            raise ValueError(f"folds[{i}]: {name} has no rows.")
        if rows.min() < 0:
            raise ValueError(f"folds[{i}]: {name} has the row number {rows.min()}, and row numbers start at 0.")
    if (both := np.intersect1d(train, test)).size:
        raise ValueError(
            f"folds[{i}]: train and test overlap: {both.size} rows are in both, such as row {both[0]}. Held-out rows "
            "must not be trained on."
        )
    return train.astype(np.int64), test.astype(np.int64)
