"""The record of a run in a directory, from which an interrupted call continues."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.metagradients.schedule import Plan
from bilevel.metagradients.snapshots import STORED, Directory, Snapshots
from bilevel.steps import PLAIN, Pulled

KEY = "run"
PROGRESS = "progress"


class Journal:
    """Stored states, and how far the backward pass is.

    Attributes:
        snapshots: the stored states.
        norms: norms of cotangents of the state, by segment.

    Args:
        backend: the framework.
        store: "device", "host" or a directory.
        run: a tree of arrays that tells runs apart.
        plan: the segments.

    Raises:
        ValueError: if the directory belongs to another run.
    """

    def __init__(self, backend: Backend, store: str | Path, run: Any, plan: Plan) -> None:
        self.backend = backend
        self.norms: dict[int, Any] = {}
        self.directory = None if in_memory(store) else Directory(Path(store))
        self.snapshots = Snapshots(backend, {} if store == "host" else self.directory)
        if self.directory is None:
            return
        key = np.frombuffer(_digest(backend, run, plan), np.uint8)
        if KEY not in self.directory:
            self.directory.clear()  # files that an interrupted `close` has left
            self.directory[KEY] = [key]
        elif not np.array_equal(self.directory[KEY][0], key):
            raise ValueError(
                f"store: {self.directory.path} has the states of another run: the first state, hparams, outer_args, "
                "the first batch, checkpoints or steps differ. Seed the order of the batches, delete the directory, or "
                "choose another one."
            )

    @property
    def started(self) -> bool:
        """Whether the first state is stored."""
        return 0 in self.snapshots.numbers(STORED)

    @property
    def segment(self) -> int | None:
        """The number of segments that are left to pull back. None: the backward pass has not begun."""
        if self.directory is None or PROGRESS not in self.directory:
            return None
        return int(self.directory[PROGRESS][0])

    def keep(self, segment: int, pulled: Pulled, norm: Any) -> None:
        """Record the cotangents at the start of a segment, and the norm of the cotangent of the state."""
        self.norms[segment] = norm
        if self.directory is not None:
            arrays = [a for a in (*pulled.state, *pulled.hparams) if a is not None]
            known = np.array([a is not None for a in pulled.hparams])
            norms = np.array([(k, self.backend.to_host(x)) for k, x in self.norms.items()])
            self.directory[PROGRESS] = [np.array(segment), norms, known, *map(self.backend.to_bytes, arrays)]

    def kept(self, like: Pulled) -> Pulled:
        """Return what `keep` has recorded last. ``like`` has the shapes and dtypes of the cotangents."""
        assert self.directory is not None
        _, norms, known, *arrays = self.directory[PROGRESS]
        self.norms.update({int(k): np.float64(norm) for k, norm in norms})
        supply = iter(arrays)
        state = [self.backend.from_bytes(next(supply), a) for a in like.state]
        cross = [
            self.backend.from_bytes(next(supply), a) if k else None for a, k in zip(like.hparams, known, strict=True)
        ]
        return Pulled(state, cross)

    def close(self) -> None:
        """Delete the files."""
        if self.directory is not None:
            del self.directory[KEY]  # first: without it, the other files are not read again
            self.directory.clear()


def in_memory(store: str | Path) -> bool:
    """Return whether states are stored in memory."""
    return store in ("device", "host")


def _digest(backend: Backend, run: Any, plan: Plan) -> bytes:
    known = sha256(repr(plan).encode())
    for path, leaf in backend.leaves(run):
        known.update(path.encode())
        known.update(_contents(backend, leaf))
    return known.digest()


def _contents(backend: Backend, leaf: Any) -> bytes:
    if backend.owns(leaf):
        return backend.to_bytes(leaf).tobytes()
    if isinstance(leaf, np.ndarray):
        return leaf.tobytes()
    return (repr(leaf) if isinstance(leaf, PLAIN) else type(leaf).__name__).encode()  # a repr may have an address
