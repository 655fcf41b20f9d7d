"""A low-rank approximation of a positive semi-definite operator, from products with random vectors."""

from collections.abc import Callable
from typing import NamedTuple

from bilevel.operators.indices import identity, indices
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.array import Array, V


class Sketch(NamedTuple):
    """An approximation U diag(eigenvalues) Uᵀ of A.

    Attributes:
        vectors: U, a stack of r orthonormal vectors. A vector is zero where a random direction depended on others.
        eigenvalues: array of shape (r,), >= 0, in decreasing order.
        smallest: the smallest sampled curvature over the largest. It is below zero beyond rounding if A is indefinite.
    """

    vectors: object
    eigenvalues: Array
    smallest: Array


def sketch(A: LinearOperator[V], rank: int, seed: int) -> Sketch:
    """Return the randomised Nyström approximation A Ω (Ωᵀ A Ω)⁻¹ (A Ω)ᵀ, by ``rank`` products.

    Stabilised as in algorithm 2.1 of Frangella, Tropp & Udell (SIAM J. Matrix Anal. Appl. 2023). The rank is at most
    the number of entries. The computation stores 3·rank vectors, the result rank vectors.
    """
    space = A.space
    xp, eps = space.xp, space.eps
    rank = min(rank, space.size)
    zero = space.dot(space.zeros(), space.zeros())
    unit, index = identity(zero, rank, space), indices(zero, rank, space)

    def stack(vector: Callable[[Array, object], V]) -> object:
        """Return the stack with vector(i, the vectors before) as its i-th vector."""

        def step(state: tuple[object, Array], _: None) -> tuple[tuple[object, Array], None]:
            vectors, i = state
            return (space.set(vectors, i, vector(i, vectors)), i + 1), None

        return space.scan(step, (space.stack(rank), index[0]), None, rank)[0][0]

    def gram(left: object, right: object) -> Array:
        """Return the matrix of the dots of two stacks."""

        def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            matrix, i = state
            row = space.stack_dot(right, space.get(left, i))
            return (xp.where(index[:, None] == i, row[None, :], matrix), i + 1), None

        return space.scan(step, (unit, index[0]), None, rank)[0][0]

    def orthonormal(vectors: object) -> object:
        """Apply Gram-Schmidt twice. A vector that depends on the vectors before it becomes zero."""

        def vector(i: Array, basis: object) -> V:
            x = space.get(vectors, i)
            length = space.norm(x)
            for _ in range(2):
                x = space.subtract(x, space.linear_combination(space.stack_dot(basis, x), basis))
            left = space.norm(x)
            new = left > 10 * eps * length
            return space.scale(xp.where(new, 1.0 / xp.where(new, left, 1.0), 0.0), x)

        return stack(vector)

    omega = orthonormal(space.normal(seed, rank))
    images = stack(lambda i, _: A(space.get(omega, i)))
    q = orthonormal(images)
    core, triangle, overlap = gram(omega, images), gram(q, images), gram(q, omega)
    finite = xp.isfinite(xp.sum(xp.abs(core) + xp.abs(triangle) + xp.abs(overlap)))
    core = xp.where(finite, (core + core.T) / 2, unit)  # LAPACK wrappers raise for nan
    triangle, overlap = xp.where(finite, triangle, unit), xp.where(finite, overlap, unit)

    # A small shift of A, undone below, keeps the core positive definite in spite of rounding.
    shift = eps * xp.sqrt(xp.sum(triangle**2))
    curvatures, axes = xp.linalg.eigh(core + shift * unit)
    top = xp.max(xp.abs(curvatures))
    positive = curvatures > eps * rank * top
    roots = xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, curvatures, 1.0)), 0.0)
    factor = (triangle + shift * overlap) @ axes * roots[None, :]
    left, singular, _ = xp.linalg.svd(factor)
    vectors = stack(lambda i, _: space.linear_combination(xp.sum(xp.where(index[None, :] == i, left, 0.0), 1), q))
    nan = xp.where(finite, 0.0, float("nan"))
    smallest = (curvatures[0] - shift) / xp.where(top > 0, top, 1.0)
    return Sketch(vectors, xp.clip(singular**2 - shift, 0.0, None) + nan, smallest + nan)
