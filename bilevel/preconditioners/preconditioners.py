"""Cheap approximate inverses that make conjugate gradients take fewer steps."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bilevel.operators.nystrom_sketch import Sketch, sketch
from bilevel.options import check_int
from bilevel.protocols import Operator, Tree, VectorSpace


@runtime_checkable
class Preconditioner(Protocol):
    """A symmetric positive definite approximation of (A + damping I)⁻¹, up to a factor. A frozen dataclass."""

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Return those of its own fields that take products with A; {} if it has them already."""
        ...

    def apply(self, vector: Tree, damping: Any, space: VectorSpace) -> Tree:
        """Return the approximation times a vector; only called once prepared."""
        ...


def check_preconditioner(solver: Any) -> None:
    """Raise a TypeError unless the option ``preconditioner`` is None or an object of the two methods."""
    value = solver.preconditioner
    if value is not None and (isinstance(value, type) or not isinstance(value, Preconditioner)):
        name = type(solver).__name__
        raise TypeError(
            f"{name}.preconditioner: expected an object with methods prepare() and apply(), such as "
            f"bl.DiagonalPreconditioner() or bl.NystromPreconditioner(), got {value!r}. Names are for bl.get_solver: "
            f'{{"name": "{name.lower()}", "preconditioner": "nystrom"}}.'
        )


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """Divide by the diagonal of the Hessian (Jacobi), for weights whose curvatures differ by decades.

    Where it is not given, it is estimated as the mean of z ∘ Hz over random signs z (Bekas, Kokiopoulou & Saad 2007),
    one product each; exact after one if the Hessian is diagonal.

    Args:
        samples: products for the estimate, >= 1.
        seed: of the random signs.
        diagonal: of the Hessian, a tree like params, without the damping. Signs are dropped.
    """

    samples: int = 10
    seed: int = 0
    diagonal: Any = None

    def __post_init__(self) -> None:
        check_int(self, "samples", least=1)
        check_int(self, "seed", least=0)

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Estimate the diagonal, unless it is there."""
        if self.diagonal is not None:
            return {}
        xp = space.xp
        normal = space.normal_like(space.stack_like(like, self.samples), self.seed)
        signs = space.map(lambda z: xp.where(z < 0, -1.0, 1.0), normal)

        def step(state: tuple[Tree, Any], _: None) -> tuple[tuple[Tree, Any], None]:
            total, i = state
            z = space.take(signs, i)
            return (space.axpy(1.0, space.map(lambda a, b: a * b, z, operator(z)), total), i + 1), None

        zero = xp.zeros_like(space.dot(like, like), dtype=xp.int32)
        (total, _), _ = space.scan(step, (space.zeros_like(like), zero), None, self.samples)
        return {"diagonal": space.scale(1.0 / self.samples, total)}

    def apply(self, vector: Tree, damping: Any, space: VectorSpace) -> Tree:
        """Divide by the diagonal, held away from zero."""
        xp = space.xp
        floor = space.max_abs(self.diagonal) * space.eps(vector) ** 0.75
        floor = xp.where(floor > 0, floor, 1.0)
        return space.map(lambda v, d: v / xp.clip(xp.abs(d) + damping, floor, None), vector, self.diagonal)


@dataclass(frozen=True)
class NystromPreconditioner:
    """Invert a Nyström sketch of the Hessian, for few large eigenvalues over a flat rest.

    P⁻¹ = (λᵣ + damping) U (Λ + damping)⁻¹ Uᵀ + (I − U Uᵀ): Frangella, Tropp & Udell (2023), equation (5.3).

    Args:
        rank: r >= 1, products for the sketch and vectors stored.
        seed: of the random vectors.
        sketch: made before, by `bl.prepare`; the other options then do not matter.
    """

    rank: int = 20
    seed: int = 0
    sketch: Sketch | None = None

    def __post_init__(self) -> None:
        check_int(self, "rank", least=1)
        check_int(self, "seed", least=0)

    def prepare(self, operator: Operator, like: Tree, space: VectorSpace) -> dict[str, Any]:
        """Make the sketch, unless it is there."""
        return {} if self.sketch is not None else {"sketch": sketch(operator, like, self.rank, self.seed, space)}

    def apply(self, vector: Tree, damping: Any, space: VectorSpace) -> Tree:
        """Shrink the vector along the sketched directions."""
        xp = space.xp
        assert self.sketch is not None
        vectors, eigenvalues, _ = self.sketch
        least = xp.min(eigenvalues) + damping
        least = xp.where(least > 0, least, xp.max(eigenvalues) * space.eps(vector))
        weights = least / xp.where(eigenvalues + damping > 0, eigenvalues + damping, 1.0) - 1.0
        weights = xp.where(eigenvalues + damping > 0, weights, 0.0)
        return space.axpy(1.0, space.combine(weights * space.project(vectors, vector), vectors), vector)
