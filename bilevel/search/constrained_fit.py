"""Solve a constrained inner problem with SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.backend import Backend
from bilevel.errors import SolverWarning
from bilevel.messages import callers_level
from bilevel.problems.constrained import Constrained
from bilevel.search.kkt import FirstOrder, System
from bilevel.spaces.array import Args

NEAR = 1e-6  # the slack of an inequality that may be active where SciPy stops
ROUNDING = 100.0  # machine epsilons: a residual that is smaller, relative to params and ∂L/∂w, is rounding


def constrained_fit(
    problem: Constrained,
    *,
    inner_args: Args = (),
    method: str = "SLSQP",
    gtol: float = 1e-8,
    maxiter: int = 1000,
    options: Mapping[str, object] | None = None,
    backend: Backend | str | None = None,
) -> Callable[[object, Any], dict[str, Any]]:
    """Return ``fit(hparams, params0) -> params``, which solves the inner problem of a `bl.Constrained`.

    Use it as the ``fit`` of `bilevel.search.minimize`. SciPy solves the problem. Nonnegative least squares gives the
    multipliers (see `bl.with_multipliers`), and Newton's method on the active set makes all of them accurate. If
    ``params0`` has multipliers, Newton's method starts there. SciPy is only called if it does not converge to a strict
    local minimum, as the inertia of the KKT matrix shows. The fit computes on the host. An evaluation takes n + m
    products, for n variables and m constraints, so it is for at most some hundreds of them.

    Args:
        problem: the problem.
        inner_args: further arguments of the objective and the constraints: a tuple.
        method: "SLSQP" or "trust-constr", of `scipy.optimize.minimize`.
        gtol: largest entry of the residual of the KKT conditions, or rounding: of ∂ℒ/∂w, of the active constraints,
            and of the multipliers of inactive ones.
        maxiter: maximum number of iterations of SciPy.
        options: further options of the method.
        backend: as in `bilevel.hypergradient`.

    Returns:
        The function. ``params0`` is a dict, such as ``{"w": w0}`` or the params of nearby hyperparameters. It warns
        (`SolverWarning`) if the residual stays above ``gtol``, for example because no w satisfies the constraints.
        For a nonconvex problem, the result is a local minimum.

    Raises:
        TypeError, ValueError: for another kind of problem or an unknown method. The function raises them for invalid
            input.

    >>> import numpy as np, bilevel as bl
    >>> outer = bl.problems.quadratic(np.eye(2), np.eye(2), target=np.zeros(2)).outer
    >>> problem = bl.problems.quadratic_program(outer, Q=np.eye(2), A=np.ones((1, 2)), b="total")
    >>> params = constrained_fit(problem)({"total": np.array([3.0])}, {"w": np.zeros(2)})
    >>> params["w"].round(9), params["equality"].round(9)
    (array([1.5, 1.5]), array([-1.5]))
    """
    if not isinstance(problem, Constrained):
        raise TypeError(f"constrained_fit: expected a bl.Constrained, got {type(problem).__name__}.")
    if method not in ("SLSQP", "trust-constr"):
        raise ValueError(f'constrained_fit: method must be "SLSQP" or "trust-constr", got {method!r}.')

    def fit(hparams: object, params0: Any) -> dict[str, Any]:
        if not isinstance(params0, dict) or "w" not in params0:
            raise ValueError('params0: the fit needs a start for w, as in params0={"w": np.zeros(10)}.')
        system = System.of(problem, params0["w"], hparams, inner_args, backend)
        eps = system.backend.space(params0["w"]).eps
        if set(params0) == set(system.like):  # a solution for nearby hyperparameters
            point, left = system.polished(system.flat(params0))
            if left <= gtol and system.is_minimum(point):
                return system.params(point)
        found = _solve(system, system.backend.to_flat(params0["w"]), method, gtol, maxiter, options or {})
        first = system.first_order(found.x)
        point, left = system.polished(np.concatenate([found.x, first.multipliers(NEAR)[0]]))
        size = max(1.0, float(np.abs(first.grad).max()), float(np.abs(point).max()))
        if not left <= max(gtol, ROUNDING * eps * size):
            _warn(found, first, left, gtol)
        return system.params(point)

    return fit


def _solve(
    system: System, w0: np.ndarray, method: str, gtol: float, maxiter: int, options: Mapping[str, object]
) -> scipy.optimize.OptimizeResult:
    """Minimize by SciPy. The objective and the constraints share each evaluation."""
    last: list[tuple[bytes, FirstOrder]] = []

    def at(w: np.ndarray) -> FirstOrder:
        if not last or last[0][0] != w.tobytes():
            last[:] = [(w.tobytes(), system.first_order(w))]
        return last[0][1]

    _, m, k = system.sizes
    constraints: list[Any] = []
    if m:
        constraints.append(
            {"type": "eq", "fun": lambda w: at(w).equality, "jac": lambda w: at(w).jacobian[:m]},
        )
    if k:  # SciPy's inequalities are nonnegative
        constraints.append({"type": "ineq", "fun": lambda w: -at(w).inequality, "jac": lambda w: -at(w).jacobian[m:]})
    tolerance = {"ftol": 1e-4 * gtol} if method == "SLSQP" else {"gtol": gtol, "xtol": gtol**2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="scipy")  # the residual is checked
        return scipy.optimize.minimize(
            lambda w: (at(w).value, at(w).grad),
            w0,
            jac=True,
            method=method,
            constraints=constraints,
            options={"maxiter": maxiter, **tolerance, **options},
        )


def _warn(found: scipy.optimize.OptimizeResult, first: FirstOrder, left: float, gtol: float) -> None:
    violated = max(np.abs(first.equality).max(initial=0.0), first.inequality.max(initial=0.0))
    infeasible = f" It violates the constraints by up to {violated:.2g}: perhaps no w satisfies them."
    infeasible = infeasible if violated > NEAR else ""
    message = (
        f"constrained_fit stopped after {found.nit} iterations with a residual entry of {left:.2g} (gtol: {gtol:.2g}; "
        f"SciPy: {str(found.message).rstrip('.: ')}).{infeasible} A hypergradient needs an accurate solution: use "
        "another start, raise maxiter or gtol, or keep the hyperparameters within bounds."
    )
    warnings.warn(SolverWarning(message), stacklevel=callers_level())
