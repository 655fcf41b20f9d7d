"""Linear equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from bilevel.prox.operator import Constant, Given, Projection, constant_like, given


def affine(A: Any, b: Given = None) -> Affine:
    """Return the projection on {w: A w = b} (Parikh & Boyd 2014, §6.2.2).

    Args:
        A: a matrix of shape (m, d), with independent rows.
        b: the right-hand side, of shape (m,). None: hparams itself. A string: ``hparams[string]``. Otherwise, it is a
            constant.

    Returns:
        An operator (v, hparams) for `bilevel.Projected`. v has shape (d,).

    Raises:
        TypeError, ValueError: for invalid arguments; when called, if hparams or shapes do not fit.

    >>> import numpy as np
    >>> affine(np.ones((1, 2)), [1.0])(np.array([1.0, 2.0]), None).round(3)
    array([-0.,  1.])
    """
    matrix = np.asarray(A, np.float64)
    if matrix.ndim != 2 or np.linalg.matrix_rank(matrix) < len(matrix):
        raise ValueError(
            f"A: expected a matrix of shape (m, d) with independent rows, got the shape {matrix.shape}"
            + (f" and the rank {np.linalg.matrix_rank(matrix)}." if matrix.ndim == 2 else ".")
        )
    return Affine(Constant(matrix), Constant(np.linalg.pinv(matrix)), given("b", b))


@dataclass(frozen=True)
class Affine(Projection):
    """See `affine`."""

    values: ClassVar[tuple[str, ...]] = ("b",)

    matrix: Constant
    inverse: Constant
    b: Any

    @override
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        matrix, inverse = constant_like(self.matrix.array, v), constant_like(self.inverse.array, v)
        if tuple(v.shape) != matrix.shape[1:] or tuple(values[0].shape) != matrix.shape[:1]:
            raise ValueError(
                f"affine: A has shape {tuple(matrix.shape)}, so expected params of shape {tuple(matrix.shape[1:])} and "
                f"b of shape {tuple(matrix.shape[:1])}, got {tuple(v.shape)} and {tuple(values[0].shape)}."
            )
        return v - inverse @ (matrix @ v - values[0])

    @override
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        by_b = self.inverse.array.T @ c
        return c - self.matrix.array.T @ by_b, [by_b]
