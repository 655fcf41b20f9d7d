"""Conjugate gradients."""

from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Literal, NamedTuple

from typing_extensions import override

from bilevel.linear_solvers.auto_damping import SLACK, solve_rows_with_auto_damping, with_auto_damping
from bilevel.linear_solvers.block_cg import solve_block
from bilevel.linear_solvers.linear_solver import DEFINITE, STEADY, SYMMETRIC, in_arrays
from bilevel.linear_solvers.restarts import DRIFT, ROUNDS, Cycle, Iterative, solve_with_restarts
from bilevel.operators.linear_operator import LinearOperator
from bilevel.operators.scaling import power_of_two
from bilevel.options import is_python_value
from bilevel.preconditioners.function import set_preconditioner
from bilevel.preconditioners.preconditioner import Preconditioner, init
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.rows import Rows


class _State(NamedTuple, Generic[V]):
    x: V
    r: V  # residual, by its recurrence
    p: V  # search direction
    rr: Array  # r·r
    rz: Array  # r·z, where z is the preconditioned residual
    pp: Array  # p·p
    largest: Array  # largest |p·Ap / p·p| so far, a lower bound of the norm of A
    steps: Array
    status: Array
    live: Array


@dataclass(frozen=True)
class CG(Iterative[object]):
    """Solve (H + damping I) v = b by conjugate gradients (Hestenes & Stiefel 1952).

    The solve stops at ``norm(b - A v) <= max(rtol * norm(b), atol)``, SciPy's rule. The status is ``CONVERGED`` only if
    a product confirms this. An ``rtol`` below the dtype's epsilon counts as the epsilon.

    With ``damping="auto"``, the first solve has no damping. So on a convex problem, v is the undamped solution. If the
    solve meets negative curvature or ends above its ``rtol``, as on most networks, 12 products estimate the smallest
    eigenvalue λmin of H. If it is negative, the next solve has the damping 2 |λmin|. It also stops if the residual is
    below a tenth of ``damping * norm(v)``: changing the damping by a tenth explains such an error. ``info.damping`` is
    the damping of v. ``maxiter`` limits each of at most four solves. ``info.steps`` counts all of them, with the
    estimates that led to another one.

    With a number as ``damping``, the solve stops at a direction without positive curvature (to rounding). The result
    is the iterate before it, with ``NEGATIVE_CURVATURE``. If this is the first direction, without a warm start, v is
    the step along it for its absolute curvature, as in truncated Newton methods (Dembo & Steihaug 1983): without a
    preconditioner, b over the curvature. "auto" also ends so if the curvature is zero to rounding.

    ``info.steps`` counts iterations, of one product each. A warm start and each check take one more product.

    `bl.hypergradients` solves its systems by block CG (O'Leary, Linear Algebra Appl. 1980), unless ``rtol`` is None. A
    step is one product per system, and minimizes the errors over the directions of all systems. So there are fewer
    steps. "auto" finds one damping for all systems that need one.

    Args:
        maxiter: maximum number of iterations, >= 0.
        rtol: relative tolerance on the residual. None: ``maxiter`` is a budget. The solve takes ``maxiter`` iterations
            unless it solves the system to rounding or breaks down. The status ``MAXITER`` is no failure then, so it
            does not warn or raise.
        atol: absolute tolerance on the residual.
        damping: added to the diagonal of the operator, >= 0, to make the eigenvalues positive; or "auto".
        preconditioner: a `Preconditioner`, a function v -> M v with M symmetric and positive definite, or None.
            ``info.steps`` does not count its products. `bl.prepare` computes it once for several calls.
    """

    requires: ClassVar[frozenset[str]] = frozenset({SYMMETRIC, STEADY, DEFINITE})

    damping: float | Literal["auto"] = "auto"
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        set_preconditioner(self)

    @override
    def init(self, A: LinearOperator[V]) -> object:
        """Return the state of the preconditioner."""
        return init(self.preconditioner, A)

    @override
    @with_auto_damping
    def solve(self, state: object, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        A = A.damped(self.fixed_damping)
        space, M = A.space, self.preconditioner
        xp, eps = space.xp, space.eps

        def precondition(r: V, rr: Array) -> tuple[V, Array]:
            """Return z and r·z."""
            if M is None:
                return r, rr
            z = M.apply(state, r, self.fixed_damping, space)
            return z, space.dot(r, z)

        def cycle(x: V, r: V, steps: Array, live: Array, tolerance: Array, norm_A: Array) -> Cycle[V]:
            start = space.dot(r, r)
            z, rz = precondition(r, start)

            def step(s: _State[V]) -> _State[V]:
                Ap = A(s.p)
                curvature = space.dot(s.p, Ap) / s.pp
                largest = xp.maximum(s.largest, xp.abs(curvature))
                alpha = s.rz / (s.pp * curvature)
                finite = xp.isfinite(curvature)
                # Relative to the largest curvature, so independent of scale. On a null direction the curvature is
                # rounding noise of either sign. Comparisons with nan are false.
                positive = curvature > eps * largest
                # 0 * nan is nan: a zero alpha would not protect r.
                r = space.axpby_where(s.live & positive & finite, -alpha, Ap, s.r)
                rr = space.dot(r, r)
                positive = positive & xp.isfinite(rr)
                ok = s.live & positive & finite
                x = space.axpby_where(ok, alpha, s.p, s.x)
                rr = xp.where(ok, rr, s.rr)
                z, rz = precondition(r, rr)
                beta = rz / s.rz
                p = space.axpby_where(ok, 1, z, s.p, beta)
                done = xp.sqrt(rr) <= A.tolerance(tolerance, x)
                status = xp.where(done, int(Status.CONVERGED), s.status)
                status = xp.where(positive, status, int(Status.NEGATIVE_CURVATURE))
                status = xp.where(finite & xp.isfinite(rz), status, int(Status.NON_FINITE))
                pp = rr + beta**2 * s.pp if M is None else space.dot(p, p)  # r is orthogonal to the old p, z is not
                return _State(
                    x=x,
                    r=r,
                    p=p,
                    rr=rr,
                    rz=xp.where(ok, rz, s.rz),
                    pp=xp.where(ok, pp, s.pp),
                    largest=xp.where(s.live, largest, s.largest),
                    steps=xp.where(s.live, s.steps + 1, s.steps),
                    status=xp.where(s.live, status, s.status),
                    live=ok & ~done & (rz > 0) & (s.steps + 1 < self.maxiter),
                )

            # A preconditioner may be nan although all products here are finite.
            running = xp.where(xp.isfinite(rz), xp.full_like(steps, int(Status.MAXITER)), int(Status.NON_FINITE))
            pp = start if M is None else space.dot(z, z)
            work = (space.copy(x), space.copy(r), space.copy(z))
            s = _State(*work, start, rz, pp, norm_A, steps, running, live & (rz > 0))
            s = space.while_loop(lambda s: s.live, step, s, self.maxiter)
            if x0 is not None:
                return Cycle(s.x, xp.sqrt(s.rr), s.steps, s.status, s.largest)
            # If the first step from zero meets no positive curvature, x is the step for the absolute curvature.
            immediate = (s.status == int(Status.NEGATIVE_CURVATURE)) & (s.steps == 1)
            curvature = xp.where(s.largest > 0, s.largest, 1.0)
            x = space.axpby_where(immediate, s.rz / (s.pp * curvature), s.p, s.x)
            size = xp.where(immediate, float("inf"), xp.sqrt(s.rr))  # unknown, so the check does not undo the step
            return Cycle(x, size, s.steps, s.status, s.largest)

        # In a short budget nothing drifts, so one cycle is enough. Then XLA keeps no start of a cycle.
        rounds = 1 if self.rtol is None and self.maxiter <= DRIFT else ROUNDS
        return solve_with_restarts(
            cycle,
            A,
            b,
            x0,
            maxiter=self.maxiter,
            rtol=self.rtol,
            atol=self.atol,
            rounds=rounds,
        )

    @override
    def solve_rows(
        self, state: object, A: LinearOperator[V], b: V, x0: V | None, rows: Rows[V]
    ) -> tuple[V, SolverInfo]:
        """Solve all rows by block CG. A row that it cannot solve is solved again, for itself.

        Without a tolerance, each row is solved for itself: a budget of block steps would have other results.
        """
        rtol, space, whole, xp = self.rtol, A.space, rows.whole, A.space.xp
        largest = rows.batched(space.max_abs, b)
        if rtol is None or (is_python_value(rtol) and rtol == 0) or len(largest) == 1 or not A.steady:
            return super().solve_rows(state, A, b, x0, rows)
        tolerance: Number = rtol
        scale = power_of_two(largest, space)[0]
        b, x0 = rows.scale(1 / scale, b), x0 if x0 is None else rows.scale(1 / scale, x0)
        auto, M = isinstance(self.damping, str), self.preconditioner

        def block(damping: Number, b: V, x0: V | None) -> tuple[V, SolverInfo, V]:
            damped = A.damped(damping)

            def precondition(r: V) -> V:
                if M is None:
                    return r
                apply = M.apply
                return rows.batched(lambda r: apply(state, r, damping, space), r)

            return solve_block(
                damped.with_slack(SLACK * damping) if auto else damped,
                b,
                x0,
                rows,
                precondition=precondition,
                maxiter=self.maxiter,
                rtol=tolerance,
                atol=self.atol / scale,
            )

        if auto:
            x, info = solve_rows_with_auto_damping(block, A, b, x0, rows)
        else:
            x, info, _ = block(self.fixed_damping, b, x0)
            info = info._replace(damping=xp.full_like(info.damping, self.damping))
        failed = info.status > int(Status.MAXITER)

        def alone(b: V, x0: V | None, damping: Array, scale: Array) -> tuple[V, SolverInfo]:
            solver = replace(self, damping=damping, atol=self.atol / scale)  # pyright: ignore[reportArgumentType]
            x, info = solver.solve(state, A, b, x0)
            return x, in_arrays(info, damping, xp)._replace(damping=damping)

        def solve_alone(solved: tuple[V, SolverInfo]) -> tuple[V, SolverInfo]:
            x, info = solved
            again = rows.where(failed, b, whole.zeros())
            x_alone, found = rows.batched(alone, again, x0, info.damping, scale)
            merged = SolverInfo(*[xp.where(failed, new, old) for new, old in zip(found, info, strict=True)])
            return rows.where(failed, x_alone, x), merged._replace(steps=info.steps + found.steps)

        x, info = whole.cond(xp.any(failed), solve_alone, (x, info))
        info = info._replace(residual_norm=scale * info.residual_norm, rhs_norm=scale * info.rhs_norm)
        return rows.scale(scale, x), info
