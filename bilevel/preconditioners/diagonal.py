"""The Hessian's diagonal as a preconditioner."""

from dataclasses import dataclass

from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import check_int
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.layout import check_layout
from bilevel.spaces.space import Space


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """Divide by the diagonal of the Hessian (Jacobi), for weights whose curvatures differ by decades.

    By default, the diagonal is estimated as the mean of z ∘ Hz over random signs z (Bekas, Kokiopoulou & Saad 2007).
    If the Hessian is diagonal, one sample is exact.

    Args:
        samples: number of random sign vectors, >= 1; each takes one product.
        seed: seed of the random signs.
        diagonal: the diagonal of the Hessian, a tree like params, without the damping. Its absolute values are used.
    """

    samples: int = 10
    seed: int = 0
    diagonal: object = None

    def __post_init__(self) -> None:
        check_int(self, "samples", least=1)
        check_int(self, "seed", least=0)

    def init(self, A: LinearOperator[V]) -> V:
        """Return the diagonal. Raise a ValueError if a given diagonal has another layout than params."""
        space = A.space
        if self.diagonal is not None:
            check_layout("preconditioner.diagonal", self.diagonal, "params", space)
            return self.diagonal  # pyright: ignore[reportReturnType]
        xp, of_leaves = space.xp, space.leaf_xp
        signs = space.map(lambda z: of_leaves.where(z < 0, -1.0, 1.0), space.normal(self.seed, self.samples))

        def step(state: tuple[V, Array], _: None) -> tuple[tuple[V, Array], None]:
            total, i = state
            z = space.get(signs, i)
            return (space.axpy(1.0, space.map(lambda a, b: a * b, z, A(z)), total), i + 1), None

        zero = xp.zeros_like(space.dot(space.zeros(), space.zeros()), dtype=xp.int32)
        (total, _), _ = space.scan(step, (space.zeros(), zero), None, self.samples)
        return space.scale(1.0 / self.samples, total)

    def apply(self, state: V, vector: V, damping: Number, space: Space[V]) -> V:
        """Divide the vector by the diagonal plus the damping, but at least by a small positive number."""
        floor, xp = space.max_abs(state) * space.eps**0.75, space.leaf_xp
        floor = space.leaf(space.xp.where(floor > 0, floor, 1.0))
        return space.map(lambda v, d: v / xp.clip(xp.abs(d) + damping, floor, None), vector, state)
