"""Leaves of a hypergradient, and directions for its comparison with finite differences."""

from collections.abc import Iterator

import numpy as np

from bilevel.backend import Backend

RANDOM, CHOSEN, LEAVES = 2, 3, 6  # directions over all of λ, coordinates, at most directions in one leaf


def leaf_slices(backend: Backend, tree: object) -> Iterator[tuple[str, tuple[int, ...], slice]]:
    """Yield the path of each leaf of hparams, its shape, and its slice of the flat vector."""
    start = 0
    for path, leaf in backend.leaves(tree):
        stop = start + int(np.prod(leaf.shape))
        yield f"hparams{path}", tuple(leaf.shape), slice(start, stop)
        start = stop


def index(i: int, shape: tuple[int, ...]) -> str:
    """Return the index of the i-th entry of an array as text, empty for a scalar."""
    return f"[{', '.join(str(k) for k in np.unravel_index(i, shape))}]" if shape else ""


def directions(
    backend: Backend, hparams: object, grad: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and vectors of shape (m,) and norm one: random vectors, and coordinates of large entries."""
    m = len(grad)
    places = [(path, shape, part) for path, shape, part in leaf_slices(backend, hparams) if part.stop > part.start]
    if m > RANDOM + CHOSEN:
        supports = [(f"random over all, {k + 1}", slice(0, m)) for k in range(RANDOM)]
        if len(places) > 1:
            supports += [(f"random in {path}", part) for path, _, part in places[:LEAVES]]
        for name, part in supports:
            d = np.zeros(m)
            d[part] = rng.standard_normal(part.stop - part.start)
            yield name, d / np.linalg.norm(d)
    chosen = np.argsort(-np.abs(grad))[: CHOSEN if m > RANDOM + CHOSEN else m]
    for path, shape, part in places:
        for i in chosen[(chosen >= part.start) & (chosen < part.stop)]:
            yield path + index(int(i) - part.start, shape), np.eye(1, m, int(i))[0]
