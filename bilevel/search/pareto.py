"""Several outer objectives: minima of their weighted sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy  # scipy.optimize loads at its first use

from bilevel.problems.k_fold import KFoldProblem, analytic_grad
from bilevel.problems.protocols import BilevelProblem
from bilevel.search.minimize import minimize
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.tree import tree_map


def pareto(
    problem: BilevelProblem,
    objectives: Sequence[Callable[..., object]],
    hparams0: H,
    *,
    weights: Any,
    fit: Callable[[H, P], P],
    params0: P | None = None,
    outer_args: Args = (),
    **options: Any,
) -> list[scipy.optimize.OptimizeResult]:
    """Minimize weighted sums Σⱼ weightⱼ Fⱼ(w*(λ), λ) of several outer objectives, one search for each row of weights.

    With positive weights, each minimum is Pareto optimal: no objective can decrease unless another one increases. The
    sums reach the convex part of the Pareto front (Miettinen 1999, §3.1). Each search starts from the last minimum, so
    sort the rows, for example ``weights=[(t, 1 - t) for t in np.linspace(0.1, 0.9, 9)]``.

    Args:
        problem: the problem. Its own ``outer`` is not used.
        objectives: F₁, ..., F_q, each as ``outer`` of the problem, with the same ``outer_args``.
        hparams0, fit, params0, outer_args: as in `minimize`.
        weights: shape (searches, q), >= 0, and not all zero in a row.
        options: further arguments of `minimize`, such as ``inner_args`` and ``bounds``.

    Returns:
        The results of `minimize`, in the order of the rows. Each has also ``objectives``, the q values at its minimum.

    Raises:
        TypeError: if an objective cannot be called.
        ValueError: if the weights do not fit. Also the errors of `minimize`.

    >>> import numpy as np, bilevel as bl
    >>> one, other = (bl.problems.quadratic(np.eye(2), np.eye(2), target=np.array(t)) for t in ([0.0, 0], [4.0, 0]))
    >>> found = pareto(one, [one.outer, other.outer], np.ones(2), weights=[(3, 1), (1, 3)], fit=lambda h, _: h)
    >>> [result.x.round(3).tolist() for result in found]
    [[1.0, 0.0], [3.0, 0.0]]
    """
    if not isinstance(objectives, Sequence):
        raise TypeError(f"objectives: expected a list of functions, got {type(objectives).__name__}.")
    for j, objective in enumerate(objectives):
        if not callable(objective):
            raise TypeError(f"objectives[{j}]: expected a function, got {type(objective).__name__}.")
    rows = _checked(weights, len(objectives))
    together = _with_outer(problem, _WeightedSum(tuple(objectives)))
    singles = [_with_outer(problem, objective).outer for objective in objectives]
    results: list[scipy.optimize.OptimizeResult] = []
    for row in rows:
        shares = tuple(row.tolist())  # Python numbers: JAX compiles once for all of them
        args = (shares, *outer_args)
        found = minimize(together, hparams0, fit=fit, params0=params0, outer_args=args, **options)
        found.objectives = np.array([float(each(found.params, found.x, *outer_args)) for each in singles])
        hparams0, params0 = found.x, found.params
        results.append(found)
    return results


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
    """Σⱼ weightⱼ Fⱼ. The weights are the first of the ``outer_args``."""

    objectives: tuple[Any, ...]

    def __call__(self, params: Any, hparams: Any, weights: Sequence[float], *args: Any) -> Any:
        return _sum(weights, [objective(params, hparams, *args) for objective in self.objectives])

    def grad(self, params: Any, hparams: Any, weights: Sequence[float], *args: Any) -> tuple[Any, Any]:
        """Return (∂F/∂w, ∂F/∂λ) for the numpy backend. Other backends differentiate the call."""
        grads = [analytic_grad(objective)(params, hparams, *args) for objective in self.objectives]

        def total(parts: list[Any]) -> Any:
            known = [(weight, part) for weight, part in zip(weights, parts, strict=True) if part is not None]
            if not known:
                return None
            shares = [weight for weight, _ in known]
            return tree_map(lambda *leaves: _sum(shares, leaves), *(part for _, part in known))

        return total([of_params for of_params, _ in grads]), total([of_hparams for _, of_hparams in grads])


def _sum(weights: Sequence[float], terms: Sequence[Any]) -> Any:
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def _with_outer(problem: Any, outer: Any) -> Any:
    """Return the problem with another outer objective."""
    if isinstance(problem, KFoldProblem):
        return dataclasses.replace(problem, problem=_with_outer(problem.problem, outer))
    if not dataclasses.is_dataclass(problem):
        raise TypeError(f"problem: expected a problem of bilevel, such as bl.Problem, got {type(problem).__name__}.")
    return dataclasses.replace(problem, outer=outer)  # pyright: ignore[reportArgumentType]


def _checked(weights: Any, count: int) -> np.ndarray:
    try:
        rows: Any = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        rows = np.empty(0)
    if rows.ndim != 2 or rows.shape[1] != count or not (rows >= 0).all() or not rows.any(1).all():
        raise ValueError(
            f"weights: expected rows of {count} numbers >= 0, one for each objective, and not all zero, got "
            f"{weights!r}."
        )
    return rows
