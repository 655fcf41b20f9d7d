"""GMRES, for operators that are not symmetric."""

from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import with_auto_damping
from bilevel.linear_solvers.cg import CG
from bilevel.linear_solvers.linear_solver import STEADY, LinearSolver
from bilevel.linear_solvers.restarts import Cycle, reach, solve_with_restarts
from bilevel.operators.indices import identity, indices
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import check_int, check_real
from bilevel.preconditioners.function import set_preconditioner
from bilevel.preconditioners.preconditioner import Preconditioner, applied, init
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V


class _State(NamedTuple, Generic[V]):
    basis: object  # a stack of orthonormal vectors of the Krylov space, followed by zeros
    rotations: Array  # (m+1, m+1), orthogonal: it makes the Hessenberg matrix triangular
    triangle: Array  # (m+1, m+1)
    norm: Array  # of the residual, from the rotations
    norm_A: Array  # the largest norm(A q) so far
    column: Array  # the number of steps in this cycle
    steps: Array  # of all cycles
    status: Array
    live: Array


@dataclass(frozen=True)
class GMRES(LinearSolver[object]):
    """Solve (A + damping I) v = b by restarted GMRES (Saad & Schultz 1986), for any square A.

    Each cycle minimizes the residual over a Krylov space of ``restart`` dimensions, orthogonalised twice. The next
    cycle starts from the true residual. The solve stops at ``norm(b - A v) <= rtol * norm(b)``, SciPy's rule. It also
    stops, with ``MAXITER``, if a cycle reduces the residual by less than a thousandth. On an indefinite or singular A,
    restarts can stagnate where a longer cycle does not.

    If the solution of a cycle is longer than ‖r‖ / (‖A‖ √eps), one more product measures its residual. Unless this is
    far smaller, the cycle leaves out the last directions, which A maps to zero, to rounding. So v stays bounded on a
    singular A.

    The solver stores ``restart`` + 1 vectors. ``info.steps`` counts iterations, of one product each. Each cycle and a
    warm start take one more product.

    Args:
        restart: dimension of a cycle, >= 1.
        max_restarts: maximum number of cycles, >= 1.
        rtol: relative tolerance on the residual. None: ``restart`` times ``max_restarts`` is a budget, as in `CG`.
        damping: added to the diagonal of the operator. "auto" needs a symmetric A: `CG` solves first and finds the
            damping.
        preconditioner: a `Preconditioner`, a function v -> M v with M close to the inverse of the operator, or None. It
            is a right preconditioner, so the stop rule is about the true residual. M need not be symmetric.
    """

    requires: ClassVar[frozenset[str]] = frozenset({STEADY})
    remedy: ClassVar[str] = "Raise restart or max_restarts, loosen rtol, or add damping."
    stagnation_remedy: ClassVar[str] = (
        "Raise restart, loosen rtol or add damping. If params is not float64, use float64."
    )

    restart: int = 30
    max_restarts: int = 10
    rtol: float | None = 1e-5
    damping: float | Literal["auto"] = 0.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_int(self, "restart", "max_restarts", least=1)
        check_real(self, "rtol", none=True)
        check_real(self, "damping", auto=True)
        set_preconditioner(self)

    @property
    @override
    def most_steps(self) -> int:
        return self.restart * self.max_restarts

    @override
    def finder(self) -> CG:
        return CG(maxiter=self.most_steps, rtol=self.rtol)

    @override
    def init(self, A: LinearOperator[V]) -> object:
        """Return the state of the preconditioner."""
        return init(self.preconditioner, A)

    @override
    @with_auto_damping
    def solve(self, state: object, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.fixed_damping)
        space = A.space
        xp, eps = space.xp, space.eps
        dimension = min(self.restart, space.size)
        precondition = applied(self.preconditioner, state, self.fixed_damping, space)

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array, norm_A: Array) -> Cycle[V]:
            size = space.norm(r)
            index, unit = indices(size, dimension + 1, space), identity(size, dimension + 1, space)
            zero = xp.zeros_like(steps)

            def step(s: _State[V]) -> _State[V]:
                w = A(precondition(space.get(s.basis, s.column)))
                length = space.norm(w)
                column = xp.zeros_like(unit[0])
                for _ in range(2):  # one pass is inaccurate for nearly dependent vectors
                    overlap = space.stack_dot(s.basis, w)
                    w = space.subtract(w, space.linear_combination(overlap, s.basis))
                    column = column + overlap
                left = space.norm(w)
                exhausted = left <= 10 * eps * length  # the Krylov space is invariant
                here, below = index == s.column, index == s.column + 1
                column = s.rotations @ xp.where(below, xp.where(exhausted, 0.0, left), column)
                at, under = xp.sum(xp.where(here, column, 0.0)), xp.sum(xp.where(below, column, 0.0))
                radius = xp.sqrt(at**2 + under**2)
                cosine, sine = (xp.where(radius > 0, part / radius, whole) for part, whole in ((at, 1.0), (under, 0.0)))
                upper = xp.sum(xp.where(here[:, None], s.rotations, 0.0), 0)
                lower = xp.sum(xp.where(below[:, None], s.rotations, 0.0), 0)
                rotations = xp.where(here[:, None], cosine * upper + sine * lower, s.rotations)
                rotations = xp.where(below[:, None], cosine * lower - sine * upper, rotations)
                column = xp.where(here, radius, xp.where(below, 0.0, column))
                remaining = size * xp.abs(xp.sum(xp.where(below, rotations[:, 0], 0.0)))
                finite = xp.isfinite(length) & xp.isfinite(radius)
                ok = s.live & finite
                q = space.scale(xp.where(exhausted, 0.0, 1.0 / left), w)
                following = xp.clip(s.column + 1, 0, dimension)
                return _State(
                    basis=space.set(s.basis, following, space.where(ok, q, space.get(s.basis, following))),
                    rotations=xp.where(ok, rotations, s.rotations),
                    triangle=xp.where(ok, xp.where(here[None, :], column[:, None], s.triangle), s.triangle),
                    norm=xp.where(ok, remaining, s.norm),
                    norm_A=xp.where(ok, xp.maximum(s.norm_A, length), s.norm_A),
                    column=xp.where(ok, s.column + 1, s.column),
                    steps=xp.where(s.live, s.steps + 1, s.steps),
                    status=xp.where(s.live & ~finite, int(Status.NON_FINITE), s.status),
                    live=ok & ~exhausted & (remaining > tolerance) & (s.column + 1 < dimension),
                )

            s = _State(
                basis=space.set(space.stack(dimension + 1), zero, space.scale(1.0 / size, r)),
                rotations=unit,
                triangle=unit,
                norm=size,
                norm_A=norm_A,
                column=zero,
                steps=steps,
                status=xp.full_like(steps, int(Status.CONVERGED)),  # the product after the cycle confirms it
                live=live,
            )
            s = space.while_loop(lambda s: s.live, step, s, dimension)
            # Column k of ``solutions`` minimizes the residual over the first k + 1 directions.
            diagonal = xp.abs(xp.sum(xp.where(index[:, None] == index[None, :], s.triangle, 0.0), 0))
            finite = xp.isfinite(xp.sum(xp.abs(s.triangle)))
            given = xp.where(finite, (index < s.column) & (diagonal > 0), False)
            triangle = xp.where(given[:, None] & given[None, :], s.triangle, unit)
            weights = xp.where(given, size * s.rotations[:, 0], 0.0)
            solutions = xp.cumsum(xp.linalg.solve(triangle, unit) * weights[None, :], 1)
            inside = given & (xp.sqrt(xp.sum(solutions**2, 0)) <= reach(size, s.norm_A, tolerance, space).near)
            last, nearest = (xp.max(xp.where(columns, index, -1)) for columns in (given, inside))

            def change(column: Array) -> V:
                weights = xp.sum(xp.where(index[None, :] == column, solutions, 0.0), 1)
                return precondition(space.linear_combination(weights, s.basis))

            def shorten(y: V) -> V:
                """Return a shorter solution, unless a product shows that the long one is far better."""
                left = xp.sqrt(xp.clip(size**2 - xp.sum(xp.where(index <= nearest, weights, 0.0) ** 2), 0.0, None))
                better = space.norm(A.residual(r, y)) <= 0.1 * left
                return space.where(better, y, change(nearest))

            y = space.cond(live & (last > nearest), shorten, change(last))
            x = space.where(live, space.axpy(1.0, y, x), x)
            return Cycle(x, s.norm, s.steps, s.status, s.norm_A)

        return solve_with_restarts(
            cycle, A, b, x0, maxiter=self.most_steps, rtol=self.rtol, rounds=self.max_restarts, progress=0.999
        )
