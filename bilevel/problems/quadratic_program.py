"""Quadratic programs whose matrices and vectors are hyperparameters or constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.problems.constrained import Constrained
from bilevel.prox.operator import Constant, Given, constant_like, given
from bilevel.spaces.tree import tree_map

Source = Constant | str


def quadratic_program(
    outer: Callable[..., object],
    *,
    Q: Given,
    q: Given = 0.0,
    A: Given = None,
    b: Given = None,
    G: Given = None,
    h: Given = None,
) -> Constrained:
    """Return the problem whose w* minimizes ½ wᵀQw + qᵀw subject to A w = b and G w ≤ h (Amos & Kolter, ICML 2017).

    Each matrix and vector is a constant, or a string: then it is ``hparams[string]``. A linear program has Q = 0. It
    has derivatives where w* is a unique vertex.

    Args:
        outer: F, (w, hparams, *outer_args) -> scalar.
        Q: of shape (n, n). Only its symmetric part (Q + Qᵀ)/2 has influence. 0.0: a linear program.
        q: of shape (n,), or a number.
        A, b: of shapes (m, n) and (m,). None: no equalities.
        G, h: of shapes (k, n) and (k,). None: no inequalities.

    Returns:
        The problem, for `bl.constrained_fit`, `bl.with_multipliers` and `bl.hypergradient`. Q, q etc. are functions of
        ``hparams``, so it needs no ``inner_args``.

    Raises:
        TypeError: if only one of A and b, or of G and h, is given, or if there are no constraints.

    >>> import numpy as np, bilevel as bl
    >>> outer = bl.problems.quadratic(np.eye(2), np.eye(2), target=np.zeros(2)).outer  # F = ½ ‖w‖²
    >>> problem = quadratic_program(outer, Q=np.eye(2), q="q", G=-np.eye(2), h=[0.0, 0.0])  # w ≥ 0
    >>> hparams = {"q": np.array([-2.0, 3.0])}
    >>> params = bl.constrained_fit(problem)(hparams, {"w": np.ones(2)})
    >>> (params["w"] + 0.0).round(6), params["inequality"].round(6)
    (array([2., 0.]), array([0., 3.]))
    """
    for names, pair in (("A and b", (A, b)), ("G and h", (G, h))):
        if (pair[0] is None) != (pair[1] is None):
            raise TypeError(f"quadratic_program: {names} belong together. Give both, or none of them.")
    matrix = given("Q", Q)
    if isinstance(matrix, Constant) and not matrix.array.ndim and matrix.array != 0:
        raise ValueError(
            f"quadratic_program: Q is the number {matrix.array:g}. Pass a matrix, or 0.0 for a linear program."
        )
    equality = None if A is None else _Affine("A", given("A", A), "b", given("b", b))
    inequality = None if G is None else _Affine("G", given("G", G), "h", given("h", h))
    return Constrained(_Quadratic(matrix, given("q", q)), outer, equality, inequality)


@dataclass(frozen=True)
class _Quadratic:
    """½ wᵀQw + qᵀw."""

    Q: Source
    q: Source

    def _matrix(self, w: Any, hparams: Any) -> Any:
        Q, n = _value("Q", self.Q, w, hparams), w.shape[0]
        if isinstance(self.Q, Constant) and not Q.ndim:
            return 0.0 * w[:, None] * w
        _check_shape("Q", Q, [(n, n)])
        return (Q + Q.T) / 2

    def _vector(self, w: Any, hparams: Any) -> Any:
        q = _value("q", self.q, w, hparams)
        _check_shape("q", q, [(w.shape[0],), ()] if isinstance(self.q, Constant) else [(w.shape[0],)])
        return q

    def __call__(self, w: Any, hparams: Any) -> Any:
        return 0.5 * w @ (self._matrix(w, hparams) @ w) + (self._vector(w, hparams) * w).sum()

    def grad(self, w: Any, hparams: Any) -> Any:
        return self._matrix(w, hparams) @ w + self._vector(w, hparams)

    def hvp(self, w: Any, hparams: Any, vector: Any) -> Any:
        return self._matrix(w, hparams) @ vector

    def cross_vjp(self, w: Any, hparams: Any, vector: Any) -> Any:
        by_Q = (np.outer(vector, w) + np.outer(w, vector)) / 2
        return _in_hparams(hparams, {self.Q: by_Q, self.q: vector})


@dataclass(frozen=True)
class _Affine:
    """M w − c. ``matrix`` and ``vector`` are their names in errors."""

    matrix: str
    M: Source
    vector: str
    c: Source

    def _matrix(self, w: Any, hparams: Any) -> Any:
        return _value(self.matrix, self.M, w, hparams)

    def __call__(self, w: Any, hparams: Any) -> Any:
        M, c = self._matrix(w, hparams), _value(self.vector, self.c, w, hparams)
        if tuple(M.shape) != (*c.shape, *w.shape):
            raise ValueError(
                f"quadratic_program: {self.vector} has shape {tuple(c.shape)} and w has shape {tuple(w.shape)}, so "
                f"expected {self.matrix} of shape {(*c.shape, *w.shape)}, got {tuple(M.shape)}."
            )
        return M @ w - c

    def jvp_params(self, w: Any, hparams: Any, vector: Any) -> Any:
        return self._matrix(w, hparams) @ vector

    def vjp_params(self, w: Any, hparams: Any, multipliers: Any) -> Any:
        return self._matrix(w, hparams).T @ multipliers

    def vjp_hparams(self, w: Any, hparams: Any, multipliers: Any) -> Any:
        return _in_hparams(hparams, {self.M: np.outer(multipliers, w), self.c: -multipliers})

    def hvp(self, w: Any, hparams: Any, multipliers: Any, vector: Any) -> None:
        return None

    def cross_vjp(self, w: Any, hparams: Any, multipliers: Any, vector: Any) -> Any:
        return _in_hparams(hparams, {self.M: np.outer(multipliers, vector)})


def _check_shape(name: str, found: Any, shapes: list[tuple[int, ...]]) -> None:
    """Raise a ValueError unless a matrix or vector fits w."""
    if tuple(found.shape) not in shapes:
        raise ValueError(
            f"quadratic_program: w has {shapes[0][0]} entries, so expected {name} of shape {shapes[0]}, got "
            f"{tuple(found.shape)}."
        )


def _value(name: str, source: Source, w: Any, hparams: Any) -> Any:
    if isinstance(source, Constant):
        return constant_like(source.array, w)
    if not isinstance(hparams, Mapping) or source not in hparams:
        found = f"the keys {sorted(hparams)}" if isinstance(hparams, Mapping) else type(hparams).__name__
        raise ValueError(f"quadratic_program: {name} is hparams[{source!r}], but hparams has {found}.")
    return hparams[source]


def _in_hparams(hparams: Any, products: Mapping[Source, Any]) -> Any:
    """Return a tree like hparams with these entries, and zeros elsewhere. None if all are of constants."""
    known = {source: product for source, product in products.items() if isinstance(source, str)}
    if not known:
        return None
    zeros = tree_map(np.zeros_like, hparams)
    return {**zeros, **{key: zeros[key] + product for key, product in known.items()}}
