"""The entries of a problem's inputs and derivatives on the host, by the paths of their leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.inspection.derivatives import Derivatives

Arrays = dict[str, np.ndarray]
"""The leaves of a tree by their paths, such as ``"params['w']"``."""


class Entries(NamedTuple):
    """The entries of `Derivatives`: of params in the first, second and fourth, of hparams in the others."""

    grad: Arrays
    product: Arrays
    cross: Arrays
    outer_params: Arrays
    outer_hparams: Arrays


class Share(NamedTuple):
    """Some of the entries of a leaf.

    >>> str(Share("params['b']", 2, 8)), str(Share("params", 3, 3))
    ("2 of the 8 entries of params['b']", 'params (all 3 entries)')
    """

    leaf: str
    number: int
    size: int

    def __str__(self) -> str:
        if self.number < self.size:
            return f"{self.number:,} of the {self.size:,} entries of {self.leaf}"
        return f"{self.leaf} (all {self.size:,} entries)" if self.size > 1 else self.leaf


def copied(backend: Backend, tree: object, name: str) -> Arrays:
    """Return copies of the leaves of a tree."""
    return {name + path: np.array(backend.to_numpy(leaf)) for path, leaf in backend.leaves(tree)}


def entries(backend: Backend, found: Derivatives[Any, Any]) -> Entries:
    """Return the entries of derivatives."""
    names = ("params", "params", "hparams", "params", "hparams")
    return Entries(*(copied(backend, tree, name) for tree, name in zip(found, names, strict=True)))


def shares(test: Callable[..., np.ndarray], *trees: Arrays) -> tuple[Share, ...]:
    """Return the leaves with entries that pass a test of the arrays of some trees."""
    found = (Share(path, int(test(*(tree[path] for tree in trees)).sum()), x.size) for path, x in trees[0].items())
    return tuple(share for share in found if share.number)


def named(test: Callable[[np.ndarray], np.ndarray], tree: Arrays) -> tuple[str, ...]:
    """Return the names of the entries that pass a test.

    >>> named(np.isnan, {"params['w']": np.array([0.0, np.nan]), "params['b']": np.array(np.nan)})
    ("params['w'][1]", "params['b']")
    """
    places = [(path, place) for path, x in tree.items() for place in np.argwhere(test(x))]
    return tuple(f"{path}[{', '.join(map(str, place))}]" if len(place) else path for path, place in places)
