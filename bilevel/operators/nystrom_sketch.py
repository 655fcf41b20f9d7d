"""A low-rank picture of a positive semi-definite operator, from products with random vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevel.operators.combinators import identity, indices, norm
from bilevel.spaces.space import Operator, Stack, Tree, VectorSpace


class Sketch(NamedTuple):
    """U diag(eigenvalues) Uᵀ, about A.

    Attributes:
        vectors: U: r orthonormal vectors, as a stack; zero where a random direction brought nothing new.
        eigenvalues: array of shape (r,), >= 0, falling.
        smallest: the least curvature met over the largest; below zero beyond rounding if A is indefinite.
    """

    vectors: Stack
    eigenvalues: Any
    smallest: Any


def sketch(operator: Operator, like: Tree, rank: int, seed: int, space: VectorSpace) -> Sketch:
    """Return the randomised Nyström approximation A Ω (Ωᵀ A Ω)⁻¹ (A Ω)ᵀ, by ``rank`` products.

    Stabilised as in algorithm 2.1 of Frangella, Tropp & Udell (SIAM J. Matrix Anal. Appl. 2023). A rank beyond
    the number of entries is cut to it. Takes 3 rank vectors while it works, and rank to keep.
    """
    xp, eps = space.xp, space.eps(like)
    rank = min(rank, space.size(like))
    zero = xp.zeros_like(space.dot(like, like))
    unit, index = identity(zero, rank, xp), indices(zero, rank, xp)

    def stack(vector: Callable[[Any, Stack], Tree]) -> Stack:
        """Return a stack, from its i-th vector, given i and the ones before."""

        def step(state: tuple[Stack, Any], _: None) -> tuple[tuple[Stack, Any], None]:
            vectors, i = state
            return (space.put(vectors, i, vector(i, vectors)), i + 1), None

        return space.scan(step, (space.stack_like(like, rank), index[0]), None, rank)[0][0]

    def gram(left: Stack, right: Stack) -> Any:
        """Return the matrix of their dots."""

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            matrix, i = state
            row = space.project(right, space.take(left, i))
            return (xp.where(index[:, None] == i, row[None, :], matrix), i + 1), None

        return space.scan(step, (unit, index[0]), None, rank)[0][0]

    def orthonormal(vectors: Stack) -> Stack:
        """Return a basis, by Gram and Schmidt done twice; zero for what depends on the vectors before."""

        def vector(i: Any, basis: Stack) -> Tree:
            x = space.take(vectors, i)
            length = norm(x, space)
            for _ in range(2):
                x = space.axpy(-1.0, space.combine(space.project(basis, x), basis), x)
            left = norm(x, space)
            new = left > 10 * eps * length
            return space.scale(xp.where(new, 1.0 / xp.where(new, left, 1.0), 0.0), x)

        return stack(vector)

    omega = orthonormal(space.normal_like(space.stack_like(like, rank), seed))
    images = stack(lambda i, _: operator(space.take(omega, i)))
    q = orthonormal(images)
    core, triangle, overlap = gram(omega, images), gram(q, images), gram(q, omega)
    finite = xp.isfinite(xp.sum(xp.abs(core) + xp.abs(triangle) + xp.abs(overlap)))
    core = xp.where(finite, (core + core.T) / 2, unit)  # LAPACK refuses nan
    triangle, overlap = xp.where(finite, triangle, unit), xp.where(finite, overlap, unit)

    # A small shift of A, taken back below, keeps rounding from making the core indefinite.
    shift = eps * xp.sqrt(xp.sum(triangle**2))
    curvatures, axes = xp.linalg.eigh(core + shift * unit)
    top = xp.max(xp.abs(curvatures))
    positive = curvatures > eps * rank * top
    roots = xp.where(positive, 1.0 / xp.sqrt(xp.where(positive, curvatures, 1.0)), 0.0)
    factor = (triangle + shift * overlap) @ axes * roots[None, :]
    left, singular, _ = xp.linalg.svd(factor)
    vectors = stack(lambda i, _: space.combine(xp.sum(xp.where(index[None, :] == i, left, 0.0), 1), q))
    nan = xp.where(finite, 0.0, float("nan"))
    smallest = (curvatures[0] - shift) / xp.where(top > 0, top, 1.0)
    return Sketch(vectors, xp.clip(singular**2 - shift, 0.0, None) + nan, smallest + nan)
