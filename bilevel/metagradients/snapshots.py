"""Stored states of a run: on the device, on the host, or in a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.backend import Backend
from bilevel.steps import PLAIN

Arrays = list[np.ndarray]
STORED = "state"  # the kind of states that the backward pass starts from again
OBSERVED = "observed"  # the kind of states that F needs, and of the end of the run
SUFFIX, UNFINISHED = ".bilevel.npz", ".bilevel.unfinished"


class Snapshots:
    """Trees by name. All trees of one name before the dash have the structure, shapes and dtypes of one tree.

    Args:
        backend: the framework.
        store: where the arrays are. A dict: on the host. A `Directory`: in files. None: the trees stay where they are.
    """

    def __init__(self, backend: Backend, store: MutableMapping[str, Arrays] | None) -> None:
        self.backend = backend
        self.store = store
        self.trees: dict[str, Any] = {}

    def save(self, name: str, tree: object) -> None:
        """Store a tree."""
        if self.store is None:
            self.trees[name] = tree
        else:
            self.store[name] = [_encode(self.backend, leaf) for _, leaf in self.backend.leaves(tree)]

    def load(self, name: str, like: Callable[[], Any]) -> Any:
        """Return a stored tree. ``like`` returns a tree with its structure, shapes and dtypes."""
        if self.store is None:
            return self.trees[name]
        arrays = iter(self.store[name])
        return self.backend.map(lambda leaf: _decode(self.backend, next(arrays), leaf), like())

    def drop(self, name: str) -> None:
        """Forget a tree."""
        (self.trees if self.store is None else self.store).pop(name)

    def numbers(self, kind: str) -> list[int]:
        """Return the n of all stored names ``kind``-n."""
        names = self.trees if self.store is None else self.store
        return [int(name.partition("-")[2]) for name in names if name.startswith(f"{kind}-")]


class Directory(MutableMapping[str, Arrays]):
    """Lists of arrays in files of a directory. A file appears when it is complete, also if the process is killed.

    Other files in the directory stay as they are.

    Raises:
        ValueError: if the directory cannot be made, or no file can be written in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(
                f"store: {str(path)!r} is no directory that files can be written in ({error.strerror}). Pass another "
                'directory, "host" or "device".'
            ) from error

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"

    @override
    def __getitem__(self, name: str) -> Arrays:
        if not self._file(name).exists():
            raise KeyError(name)
        with np.load(self._file(name), allow_pickle=False) as file:
            return [file[str(i)] for i in range(len(file.files))]

    @override
    def __setitem__(self, name: str, arrays: Arrays) -> None:
        unfinished = self.path / f"{name}{UNFINISHED}"
        with unfinished.open("wb") as file:
            np.savez(file, **{str(i): array for i, array in enumerate(arrays)})  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._file(name))

    @override
    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    @override
    def __iter__(self) -> Iterator[str]:
        return (file.name.removesuffix(SUFFIX) for file in sorted(self.path.glob(f"*{SUFFIX}")))

    @override
    def __len__(self) -> int:
        return len(list(iter(self)))

    @override
    def clear(self) -> None:
        for suffix in (SUFFIX, UNFINISHED):
            for file in self.path.glob(f"*{suffix}"):
                file.unlink()


def _encode(backend: Backend, leaf: Any) -> np.ndarray:
    if backend.owns(leaf):
        return backend.to_bytes(leaf)
    return np.asarray(leaf if isinstance(leaf, PLAIN) else 0)


def _decode(backend: Backend, array: np.ndarray, like: Any) -> Any:
    if backend.owns(like):
        return backend.from_bytes(array, like)
    return array.item() if isinstance(like, PLAIN) else like
