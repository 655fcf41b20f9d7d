"""A Nyström sketch of the Hessian as a preconditioner."""

from dataclasses import dataclass

from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.nystrom_sketch import Sketch, sketch
from bilevel.options import check_int
from bilevel.spaces.array import Number, V
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class NystromPreconditioner:
    """Invert a Nyström sketch of the Hessian, for spectra with few large eigenvalues.

    P⁻¹ = (λᵣ + damping) U (Λ + damping)⁻¹ Uᵀ + (I − U Uᵀ): Frangella, Tropp & Udell (2023), equation (5.3).

    Args:
        rank: r >= 1. The sketch takes r products and stores r vectors.
        seed: seed of the random vectors.
    """

    rank: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_int(self, "rank", least=1)
        check_int(self, "seed", least=0)

    def init(self, A: LinearOperator[V]) -> Sketch:
        """Return the sketch. Raise a TypeError if A is not symmetric."""
        if not A.symmetric:
            raise TypeError(
                "NystromPreconditioner needs a symmetric operator. The operator of a fixed point or a root is not "
                "symmetric: use bl.DiagonalPreconditioner(), or a function v -> M v."
            )
        return sketch(A, self.rank, self.seed)

    def apply(self, state: Sketch, vector: V, damping: Number, space: Space[V]) -> V:
        """Return P⁻¹ times the vector."""
        xp = space.xp
        vectors, eigenvalues, _ = state
        least = xp.min(eigenvalues) + damping
        least = xp.where(least > 0, least, xp.max(eigenvalues) * space.eps)
        weights = least / xp.where(eigenvalues + damping > 0, eigenvalues + damping, 1.0) - 1.0
        weights = xp.where(eigenvalues + damping > 0, weights, 0.0)
        return space.axpy(1.0, space.linear_combination(weights * space.stack_dot(vectors, vector), vectors), vector)
