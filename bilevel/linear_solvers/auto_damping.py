"""A damping from the negative curvature that a solve meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from bilevel.operators.lanczos import negative_curvature
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import is_python_value
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.rows import Rows

if TYPE_CHECKING:
    from bilevel.linear_solvers.linear_solver import LinearSolver

FACTOR = 2.0  # of |λmin|. Measured: from 1.1 to 2.5 the results differ little, and below 1 they are useless.
SAFE = 1.1  # times |λmin|: a smaller damping is too small
SLACK = 0.1  # times δ: an error of the solution is accepted if a change of δ by so much explains it
ATTEMPTS = 4
KEPT = 0.95  # of the last damping: the least that the next solve of a loop tries, so δ can fall slowly
GROWTH = 2.0  # the largest factor between the dampings that two solves of a loop try


class _State(NamedTuple, Generic[V]):
    x: V
    steps: Array  # of all attempts and estimates
    residual_norm: Array
    rhs_norm: Array
    status: Array
    used: Number  # the damping of x
    damping: Number  # of the next attempt
    live: Array


class _Rows(NamedTuple, Generic[V]):
    x: V
    info: SolverInfo  # with the damping of each x
    damping: Number  # of the next attempt
    live: Array


def with_auto_damping(solve: Callable[..., tuple[V, SolverInfo]]) -> Callable[..., tuple[V, SolverInfo]]:
    """Decorate `LinearSolver.solve`: with ``damping="auto"``, find the damping."""

    @wraps(solve)
    def choose(
        self: LinearSolver[Any], state: object, A: LinearOperator[V], b: V, x0: V | None
    ) -> tuple[V, SolverInfo]:
        if isinstance(self.damping, str):
            return solve_with_auto_damping(self, state, A, b, x0)
        return solve(self, state, A, b, x0)

    return choose


def solve_with_auto_damping(
    solver: LinearSolver[Any], state: object, A: LinearOperator[V], b: V, x0: V | None, start: Number | None = None
) -> tuple[V, SolverInfo]:
    """Solve (A + δI) v = b with a small δ. If A + δI curves down, solve again with δ = 2 |λmin|.

    If a solve meets negative curvature, the next δ is also at least twice the last one. A solve that stops at its
    maximum number of steps may have missed a negative curvature: few steps of CG on a network give a v that is large in
    directions of almost no curvature. Such a solve is repeated only if δ is less than 1.1 |λmin|.

    An inner training that ends early leaves the directions of curvature −λ that it had no time to descend: λ is at
    most about 1 / (step size · number of steps). The derivative of gradient descent resolves no curvature below this
    limit either: its filter (1 − (1 − ηh)ᵀ) / h of the eigenvalues h has the value ηT at zero, as 1 / (h + δ) with
    δ = 1 / (ηT) has. So |λmin| tells the right size of δ, without knowledge of the training (early stopping as a
    ridge penalty: Ali, Kolter & Tibshirani, AISTATS 2019).

    |λmin| is estimated by Lanczos' method from the v of the failed solve, which is rich in directions of small
    curvature. An error of the solve that a change of δ by a tenth would explain is accepted.

    Args:
        solver: a solver with ``damping="auto"``. If it does not stop at negative curvature, its `finder` finds δ. Then
            the solver itself starts from the finder's v.
        state, A, b, x0: as in `LinearSolver.solve`.
        start: the first δ, unless the solver's `least_damping` is larger. None: the least damping, zero by default.

    Raises:
        TypeError: if A is not symmetric, or differs from product to product.
    """
    if not A.steady:
        raise TypeError(
            f'{solver.name}: damping="auto" needs one symmetric operator. The operator of a fixed point or a root is '
            "not symmetric, and a list of batches has another operator for each product. Give the damping as a number."
        )
    space, xp = A.space, A.space.xp
    finder, first = solver.finder(), solver.least_damping(state, A)
    if start is not None:
        first = start if is_python_value(first) and first == 0 else xp.maximum(start * xp.ones_like(first), first)

    def damped(solver: LinearSolver[Any], damping: Number) -> LinearSolver[Any]:
        return replace(solver, damping=damping)  # pyright: ignore[reportArgumentType]

    # Without a tolerance, MAXITER is no failure, so λmin is not estimated.
    budget = finder.rtol is None or (is_python_value(finder.rtol) and finder.rtol == 0)

    def attempt(s: _State[V]) -> _State[V]:
        x, info = damped(finder, s.damping).solve(state, A.with_slack(SLACK * s.damping), b, x0)
        fine = int(Status.MAXITER if budget else Status.CONVERGED)
        failed = (info.status > fine) & (info.status < int(Status.NON_FINITE))  # statuses have an order
        steps = s.steps + info.steps
        after = _State(x, steps, info.residual_norm, info.rhs_norm, info.status, s.damping, s.damping, failed)
        return space.cond(failed, raise_damping, after)

    def raise_damping(s: _State[V]) -> _State[V]:
        """Choose the damping of the next attempt. If there is no reason for a larger one, this was the last attempt."""
        curvature, products = negative_curvature(A, s.x)
        met = s.status != int(Status.MAXITER)  # the solve itself met negative curvature
        least = xp.where(met, 2.0 * s.damping, 0.0)
        damping = xp.maximum(FACTOR * curvature, least)
        live = xp.where(met, damping > 0, SAFE * curvature > s.damping)
        return s._replace(steps=xp.where(live, s.steps + products, s.steps), damping=damping, live=live)

    size = space.norm(b)
    zero = xp.zeros_like(size, dtype=xp.int32)
    s = _State(b, zero, size, size, zero, first, first, zero == 0)
    s = space.while_loop(lambda s: s.live, lambda s: space.cond(s.live, attempt, s), s, ATTEMPTS)
    info = SolverInfo(s.steps, s.residual_norm, s.rhs_norm, s.status, damping=s.used)
    if finder is solver:
        return s.x, info
    x, last = damped(solver, s.used).solve(state, A.with_slack(SLACK * s.used), b, s.x)
    return x, last._replace(steps=s.steps + last.steps, damping=s.used)


def next_damping(A: LinearOperator[V], damping: Number, v: V, image: V, error: Number) -> Number:
    """Return the damping that the next solve of a loop tries first, by one product with its operator A.

    In a loop over batches, each solve has the Hessian A of another batch. Let A₀ be the Hessian of the last solve, and
    v its solution. The noise of the curvature is ‖(A − A₀) v‖ / ‖v‖. With a smaller δ, v does not even roughly solve
    the system of the next batch. So δ is at least twice this noise, as it is at least 2 |λmin|. To balance δ ‖v‖ with
    the error ‖(A − A₀) v‖ is the generalized discrepancy principle (Goncharsky, Leonov & Yagola, USSR Comput. Math.
    Math. Phys. 1973).

    The result is twice the noise, but from solve to solve, δ at most doubles, and falls by at most a twentieth. Without
    these limits, δ would follow the |λmin| of each batch, which varies a hundredfold, and so would the length of v.

    Args:
        A: the operator of the next solve, without damping.
        damping: of the last solve.
        v: the solution of the last solve, or zero.
        image: b − δ v of the last solve, which is A₀ v up to the residual.
        error: the norm of this residual.
    """
    space, xp = A.space, A.space.xp
    change, size = space.norm(space.subtract(A(v), image)), space.norm(v)
    # A(v) - image also holds the residual of the last solve. Take it out, as if it were orthogonal to (A − A₀) v.
    explained = error / xp.where(change > 0, change, 1.0)
    change = change * xp.sqrt(xp.clip(1.0 - explained**2, 0.0, None))
    noise = change / xp.where(size > 0, size, 1.0)
    noise = xp.where(xp.isfinite(noise), noise, 0.0)
    return xp.clip(FACTOR * noise, KEPT * damping, GROWTH * damping)


def solve_rows_with_auto_damping(
    solve: Callable[[Number, V, V | None], tuple[V, SolverInfo, V]],
    A: LinearOperator[V],
    b: V,
    x0: V | None,
    rows: Rows[V],
) -> tuple[V, SolverInfo]:
    """Solve (A + δI) v = b for all rows of b, as `solve_with_auto_damping` does, with one δ for all rows that need it.

    A row that is solved keeps its v and its damping. |λmin| belongs to A, so one estimate by 12 products serves all
    other rows. It starts from the direction of the smallest curvature that the solve has found.

    Args:
        solve: (δ, b, x0) -> rows of the solutions of (A + δI) v = b, the info, with arrays of shape (Q,), and a
            direction of small curvature.
        A, b, x0, rows: as in `LinearSolver.solve_rows`.
    """
    whole, xp = rows.whole, A.space.xp

    def attempt(s: _Rows[V]) -> _Rows[V]:
        open_ = s.info.status != int(Status.CONVERGED)
        x, info, lowest = solve(s.damping, rows.where(open_, b, whole.zeros()), x0)
        merged = [xp.where(open_, new, old) for new, old in zip(info, s.info, strict=True)]
        info = SolverInfo(*merged)._replace(
            steps=s.info.steps + xp.where(open_, info.steps, 0), damping=xp.where(open_, s.damping, s.info.damping)
        )
        failed = (info.status > int(Status.CONVERGED)) & (info.status < int(Status.NON_FINITE))
        after = _Rows(rows.where(open_, x, s.x), info, s.damping, xp.any(failed))
        return whole.cond(after.live, lambda s: raise_damping(s, failed, lowest), after)

    def raise_damping(s: _Rows[V], failed: Array, lowest: V) -> _Rows[V]:
        curvature, products = negative_curvature(A, lowest)
        met = xp.any(s.info.status == int(Status.NEGATIVE_CURVATURE))
        damping = xp.maximum(FACTOR * curvature, xp.where(met, 2.0 * s.damping, 0.0))
        live = xp.where(met, damping > 0, SAFE * curvature > s.damping)
        steps = xp.where(live & failed, s.info.steps + products, s.info.steps)
        return _Rows(s.x, s.info._replace(steps=steps), damping, live)

    sizes = rows.norms(b)
    zero, nan = xp.zeros_like(sizes), xp.full_like(sizes, float("nan"))
    count = xp.zeros_like(sizes, dtype=xp.int32)
    info = SolverInfo(count, sizes, sizes, count + int(Status.MAXITER), nan, nan, zero, zero)
    s = _Rows(b, info, zero[0], zero[0] == 0)
    s = whole.while_loop(lambda s: s.live, lambda s: whole.cond(s.live, attempt, s), s, ATTEMPTS)
    return s.x, s.info
