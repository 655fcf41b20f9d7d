"""The KKT conditions of a constrained problem on the host, and multipliers for a solution of any solver."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Self

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.errors import InnerProblemWarning
from bilevel.linear_solvers.exact import check_size, solve_dense
from bilevel.messages import callers_level, listed
from bilevel.problems.constrained import Constrained
from bilevel.problems.gradients import in_params
from bilevel.spaces.array import Args, Array
from bilevel.validation import check_inputs, find_backend, wrong_calls_named

NEWTON_STEPS = 10


def with_multipliers(
    problem: Constrained,
    w: object,
    hparams: object,
    *,
    inner_args: Args = (),
    tol: float = 1e-6,
    backend: Backend | str | None = None,
) -> dict[str, Any]:
    """Return the params of a constrained problem, with multipliers, for a solution w of any solver.

    The multipliers minimize the norm of ∂L/∂w + (∂h/∂w)ᵀν + (∂g_a/∂w)ᵀμ with μ ≥ 0, by SciPy's ``nnls`` (Lawson &
    Hanson 1974). g_a are the inequalities within ``tol`` of zero. So the solver's signs and scales of multipliers do
    not matter. Newton's method on the active set then makes w and the multipliers accurate to rounding. It computes on
    the host, with as many products as w and the constraints have entries.

    Args:
        problem: the problem.
        w: the solution: a tree of arrays of any backend.
        hparams, inner_args, backend: as in `bilevel.hypergradient`.
        tol: the accuracy of w: the largest violation of a constraint, the largest slack of an active inequality, and
            the largest entry of ∂ℒ/∂w relative to ∂L/∂w (or to one, if ∂L/∂w is smaller).

    Returns:
        The dict with "w", and "equality" and "inequality" where the problem has them.

    Raises:
        ValueError: if w violates a constraint, or if no multipliers satisfy the KKT conditions. The message names the
            constraints.
        TypeError: for another kind of problem.

    Warns:
        InnerProblemWarning: if the gradients of the active constraints are linearly dependent. Then the multipliers
            are not unique, and w*(λ) may have no derivative.

    >>> import numpy as np, bilevel as bl
    >>> outer = bl.problems.quadratic(np.eye(2), np.eye(2), target=np.zeros(2)).outer
    >>> problem = bl.problems.quadratic_program(outer, Q=np.eye(2), q="q", G=-np.eye(2), h=[0.0, 0.0])
    >>> with_multipliers(problem, np.array([2.0, 0.0]), {"q": np.array([-2.0, 3.0])})["inequality"]
    array([0., 3.])
    """
    system = System.of(problem, w, hparams, inner_args, backend)
    w0 = system.backend.to_flat(w)
    first = system.first_order(w0)
    _check_feasible(first, tol)
    multipliers, left = first.multipliers(tol)
    limit = tol * max(1.0, float(np.abs(first.grad).max()))
    if left > limit:
        raise ValueError(
            f"w is no KKT point: the gradient of the Lagrangian has an entry of {left:.2g} with the best multipliers "
            f"(limit: {limit:.2g}). Solve the inner problem more accurately, or check that the solver has the same "
            "objective and constraints: equality(w, hparams) = 0 and inequality(w, hparams) <= 0."
        )
    _warn_if_dependent(first, tol)
    return system.params(system.polished(np.concatenate([w0, multipliers]))[0])


class FirstOrder(NamedTuple):
    """A constrained problem at a point w of shape (n,).

    Attributes:
        value: L.
        grad: ∂L/∂w, of shape (n,).
        equality: h, of shape (m,).
        inequality: g, of shape (k,).
        jacobian: ∂(h, g)/∂w, of shape (m + k, n).
    """

    value: float
    grad: np.ndarray
    equality: np.ndarray
    inequality: np.ndarray
    jacobian: np.ndarray

    def active(self, tol: float) -> np.ndarray:
        """Return the mask of the equalities and of the inequalities within ``tol`` of zero, of shape (m + k,)."""
        return np.concatenate([np.ones(len(self.equality), bool), self.inequality >= -tol])

    def multipliers(self, tol: float) -> tuple[np.ndarray, float]:
        """Return the best multipliers, of shape (m + k,), and the largest entry of ∂ℒ/∂w."""
        active, m = self.active(tol), len(self.equality)
        multipliers = np.zeros(len(active))
        if active.any():  # nnls of SciPy 1.17 aborts the process for a matrix without columns
            columns = self.jacobian[active].T
            found, _ = scipy.optimize.nnls(np.hstack([columns, -columns[:, :m]]), -self.grad)
            found[:m] -= found[columns.shape[1] :]  # an equality has a column for each sign
            multipliers[active] = found[: columns.shape[1]]
        return multipliers, float(np.abs(self.grad + self.jacobian.T @ multipliers).max(initial=0.0))


class System(NamedTuple):
    """The KKT conditions at fixed hyperparameters, as functions of flat float64 arrays on the host."""

    backend: Backend
    problem: Constrained
    like: dict[str, Any]
    hparams: object
    args: Args
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, problem: Constrained, w: object, hparams: object, args: Args, backend: Backend | str | None) -> Self:
        """Check the arguments. ``sizes`` are the numbers of variables, equalities and inequalities."""
        if not isinstance(problem, Constrained):
            raise TypeError(f"problem: expected a bl.Constrained, got {type(problem).__name__}.")
        backend = find_backend(backend, w, hparams)
        check_inputs(backend, w, hparams, args)
        with wrong_calls_named(problem, args, None):
            values = backend.run(_constraints, problem, w, hparams, args)
        m, k = (int(np.prod(values[name].shape)) if name in values else 0 for name in ("equality", "inequality"))
        n = backend.space(w).size
        check_size(n + m + k, "the KKT system")
        zeros = {name: backend.space(value).zeros() for name, value in values.items()}
        return cls(backend, problem, {"w": w, **zeros}, hparams, args, (n, m, k))

    def first_order(self, w: np.ndarray) -> FirstOrder:
        """Return the values and first derivatives at w."""
        n, m, _ = self.sizes
        point = np.concatenate([w, np.zeros(sum(self.sizes[1:]))])
        value, residual, matrix = self._evaluate(point, np.ones(self.sizes[2]))
        return FirstOrder(value, residual[:n], residual[n : n + m], residual[n + m :], matrix[n:, :n])

    def at(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual at (w, ν, μ) and its Jacobian, on the active set of the point."""
        values = self.backend.run(_constraints, self.problem, self.params(point)["w"], self.hparams, self.args)
        flat = self.backend.to_flat(values["inequality"]) if self.sizes[2] else np.zeros(0)
        return self._evaluate(point, (point[sum(self.sizes[:2]) :] + flat > 0).astype(float))[1:]

    def polished(self, point: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the best point of a few steps of Newton's method on the active set, and its largest residual."""
        best, least = point, np.inf
        for _ in range(NEWTON_STEPS):
            residual, matrix = self.at(point)
            left = float(np.abs(residual).max())
            if not left < 0.5 * least:
                break
            best, least = point, left
            if left > 0:
                point = point - solve_dense(matrix, residual)
        return best, least

    def is_minimum(self, point: np.ndarray) -> bool:
        """Tell whether a KKT point is a strict local minimum with independent constraints, by the inertia.

        The matrix then has one negative eigenvalue for each constraint, and no zero (Gould, Math. Programming 1985).
        """
        eigenvalues = np.linalg.eigvalsh(self.at(point)[1])
        least = len(point) * self.backend.space(self.like).eps * np.abs(eigenvalues).max()
        return int((eigenvalues > least).sum()) == self.sizes[0] and int((eigenvalues < -least).sum()) == sum(
            self.sizes[1:]
        )

    def flat(self, params: dict[str, Any]) -> np.ndarray:
        """Return (w, ν, μ) from a dict of params."""
        names = [name for name in ("w", "equality", "inequality") if name in params]
        return np.concatenate([self.backend.to_flat(params[name]) for name in names])

    def params(self, point: np.ndarray) -> dict[str, Any]:
        """Return (w, ν, μ) as the dict of params."""
        ends = np.cumsum([0, *self.sizes])
        parts = {name: point[ends[i] : ends[i + 1]] for i, name in enumerate(("w", "equality", "inequality"))}
        return {name: self.backend.from_flat(parts[name], like) for name, like in self.like.items()}

    def _evaluate(self, point: np.ndarray, active: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Return Φ, its gradient and its Hessian, in the order w, ν, μ."""
        mask = self.params(np.concatenate([point[: -self.sizes[2]], active]))["inequality"] if self.sizes[2] else None
        found = self.backend.run(_second_order, self.problem, self.params(point), self.hparams, (mask, *self.args))
        value, residual, matrix = (np.asarray(self.backend.to_numpy(x), np.float64) for x in found)
        order = self._order()
        return float(value), residual[order], matrix[np.ix_(order, order)]

    def _order(self) -> np.ndarray:
        """Return the places of (w, ν, μ) among the leaves of params. Frameworks order a dict in different ways."""
        ends = np.cumsum([0, *self.sizes])
        numbers = self.backend.to_flat(self.params(np.arange(ends[-1], dtype=np.float64)))
        return np.argsort(numbers.round().astype(int))


def _constraints(backend: Backend, problem: Constrained, w: object, hparams: object, args: Args) -> dict[str, Array]:
    """Return the values of the constraints."""
    functions = {"equality": problem.equality, "inequality": problem.inequality}
    values: dict[str, Any] = {name: f(w, hparams, *args) for name, f in functions.items() if f is not None}
    for name, value in values.items():
        if not hasattr(value, "shape"):
            kind = type(value).__name__
            raise TypeError(f"{name}: expected an array with one entry for each constraint, got {kind}.")
    return values


def _second_order(
    backend: Backend, problem: Constrained, params: Any, hparams: Any, args: Args
) -> tuple[Array, Array, Array]:
    """Return the Lagrangian, its gradient and its Hessian, flat. JAX compiles this function once for all fits."""
    space = backend.space(params)
    at = backend.inner(problem.lagrangian, params, hparams, args)
    value = in_params(backend, problem.lagrangian, params, hparams, args).value
    return value, space.ravel(at.residual), space.materialise(at.vjp_params)


def _check_feasible(first: FirstOrder, tol: float) -> None:
    for name, amounts in (("equality", np.abs(first.equality)), ("inequality", first.inequality)):
        violated = np.flatnonzero(amounts > tol)
        if len(violated):
            places = listed([f"{name}[{i}]" for i in violated[:5]])
            rest = "" if len(violated) <= 5 else f" and {len(violated) - 5} more"
            sign = "= 0" if name == "equality" else "<= 0"
            raise ValueError(
                f"w violates {places}{rest} by up to {amounts.max():.2g} (tol: {tol:.2g}). A constraint is "
                f"{name}(w, hparams) {sign}. Check its sign, or solve the inner problem more accurately."
            )


def _warn_if_dependent(first: FirstOrder, tol: float) -> None:
    active = first.jacobian[first.active(tol)]
    rank = np.linalg.matrix_rank(active) if active.size else len(active)
    if rank < len(active):
        message = (
            f"the gradients of the {len(active)} active constraints at w are linearly dependent (rank {rank}). So the "
            "multipliers are not unique, and the solution may have no derivative by the hyperparameters. Remove "
            "redundant constraints."
        )
        warnings.warn(InnerProblemWarning(message), stacklevel=callers_level())
