"""Influence scores of training examples."""

from typing import Any

from bilevel.backend import Backend
from bilevel.convergence import OnFailure
from bilevel.hypergradient import SolverSpec
from bilevel.hypergradients import hypergradients
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args
from bilevel.validation import find_backend


def influence(
    problem: BilevelProblem,
    params: object,
    weights: Any,
    *,
    inner_args: Args = (),
    outer_args: Args | list[Args] = (),
    solver: SolverSpec = "cg",
    backend: Backend | str | None = None,
    on_failure: OnFailure = "warn",
) -> Any:
    """Return the influence of N training examples on Q queries: the derivatives dF_q/dλ_i by a weight per example.

    These are the influence functions of Koh & Liang (ICML 2017), equation 2, by `hypergradients`. The weights are the
    hyperparameters of the problem, usually all one, and the inner objective multiplies the loss of each example by its
    weight:

        def inner(params, weights, x, y):
            return (weights * losses(params, x, y)).mean() + penalty(params)

        def outer(params, weights, x, y):
            return losses(params, x, y)             # one value for each query

        scores = bl.influence(bl.Problem(inner, outer), params, ones, inner_args=(x, y), outer_args=(x_q, y_q))

    To first order, leaving out example i changes F_q by −weights[i]·scores[q, i]. So an example with a positive score
    raises the loss of the query. With the mean above, the scores are 1/N times the influence I_up,loss of Koh & Liang,
    who add the loss of the example without the factor 1/N. If inner only is a sum, they are equal.

    Args:
        problem: as in `hypergradients`.
        params: w, the minimum of the inner objective for these weights. Networks before the end of their training need
            a damping, which ``cg`` finds, or Gauss-Newton products (`bl.Problem.from_model`).
        weights: λ, an array of shape (N,).
        inner_args: the N training examples.
        outer_args, solver, backend, on_failure: as in `hypergradients`.

    Returns:
        An array of shape (Q, N), like ``weights``.

    Raises:
        TypeError, ValueError, SolverError: as in `hypergradients`, and if ``weights`` is not one array of shape (N,).

    Warns:
        SolverWarning, InnerProblemWarning, DependenceWarning: as in `hypergradients`.

    >>> import numpy as np, bilevel as bl
    >>> class Mean:  # L = Σ λ_i (w − x_i)² / 2, so w* = Σ λ_i x_i / Σ λ_i
    ...     def grad(self, w, lam, x): return np.sum(lam * (w - x), keepdims=True)
    ...     def hvp(self, w, lam, v, x): return np.sum(lam) * v
    ...     def cross_vjp(self, w, lam, v, x): return (w - x) * v
    ...     def __call__(self, w, lam, x): return np.sum(lam * (w - x) ** 2) / 2
    >>> class Queries:  # F_q = t_q w*
    ...     def __call__(self, w, lam, t): return t * w
    ...     def grad(self, w, lam, t): return t[:, None], None
    >>> x, t = np.array([1.0, 2.0, 6.0]), np.array([1.0, 10.0])
    >>> problem = bl.Problem(Mean(), Queries())
    >>> bl.influence(problem, np.array([3.0]), np.ones(3), inner_args=(x,), outer_args=(t,)).round(3)
    array([[-0.667, -0.333,  1.   ],
           [-6.667, -3.333, 10.   ]])
    """
    backend = find_backend(backend, params, weights)
    if not backend.owns(weights) or len(weights.shape) != 1:
        found = f"an array of shape {tuple(weights.shape)}" if backend.owns(weights) else type(weights).__name__
        raise ValueError(
            f"weights: expected one array of shape (N,), with a weight for each training example, got {found}. For "
            "other hyperparameters, use bl.hypergradients."
        )
    return hypergradients(
        problem,
        params,
        weights,
        inner_args=inner_args,
        outer_args=outer_args,
        solver=solver,
        backend=backend,
        on_failure=on_failure,
    ).grad
