"""Cross-validation as one bilevel problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from bilevel.linearization import Dependence, LinearizedMap, Reduction
from bilevel.problems.folds import Folds, SplitRows
from bilevel.problems.protocols import BilevelProblem, Kind
from bilevel.spaces.array import Args, Array, H, P
from bilevel.spaces.tree import tree_map

if TYPE_CHECKING:
    from bilevel.backend import Backend


def k_fold(problem: BilevelProblem, folds: Iterable[Any]) -> KFoldProblem:
    """Return cross-validation of a problem over folds, as one bilevel problem.

        F(w, λ) = 1/K Σₖ Fₖ(wₖ, λ)   with   wₖ = argmin Lₖ( · , λ)

    Lₖ is the inner objective on the training rows of fold k, and Fₖ is the outer objective on its held-out rows.
    ``params`` are a list of K trees. ``inner_args`` and ``outer_args`` are the arrays of all rows, such as ``(X, y)``,
    with rows along the first axis: dense arrays of any backend, or scipy.sparse for NumPy. One linear solve serves all
    folds, because their systems are independent.

    Args:
        problem: the problem of one fold: `bl.Problem`, `bl.FixedPoint` or `bl.Root`.
        folds: K pairs (train, test) of arrays of row numbers, such as ``sklearn.model_selection.KFold(5).split(X)``.

    Returns:
        The problem, for `bl.hypergradient`, `bl.minimize` and `bl.scipy_fit`. Its method
        `bilevel.problems.k_fold.KFoldProblem.fit_each` returns a ``fit`` of all folds from a ``fit`` of one.

    Raises:
        TypeError: if ``problem`` is no problem, or the folds are not pairs of arrays of integers.
        ValueError: if there is no fold, or if a fold is empty, has negative row numbers or trains on held-out rows.
            Derivatives raise it if the arrays have different numbers of rows, or fewer than the folds need.

    >>> import numpy as np, bilevel as bl
    >>> rows = np.arange(6)
    >>> folds = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)]
    >>> cv = k_fold(bl.problems.ridge(), folds)
    >>> data = np.vander(np.linspace(-1, 1, 6), 3), np.arange(6.0) ** 2
    >>> fit = bl.scipy_fit(cv, inner_args=data)
    >>> start, w = np.zeros(3), [np.zeros(3)] * 3
    >>> found = bl.minimize(cv, start, fit=fit, params0=w, inner_args=data, outer_args=data, bounds=(-10, 2))
    >>> len(found.params), bool(found.fun < found.history[0].value)
    (3, True)
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"k_fold: expected a problem, such as bl.Problem(inner, outer), got {type(problem).__name__}.")
    return KFoldProblem(problem, Folds(folds))


@dataclass(frozen=True)
class KFoldProblem:
    """The problem that `bilevel.problems.k_fold` returns.

    Attributes:
        problem: the problem of one fold.
        folds: the row numbers.
    """

    problem: BilevelProblem
    folds: Folds | SplitRows

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def outer(self) -> _MeanOverFolds:
        """The mean of the outer objectives over the folds, each on its held-out rows."""
        return _MeanOverFolds(self.problem.outer, self.folds)

    @property
    def kind(self) -> Kind:
        """The kind of the problem of one fold."""
        return self.problem.kind

    def fit_each(self, fit: Callable[..., P], args: Args) -> Callable[[Any, list[P] | None], list[P]]:
        """Return ``fit(hparams, params0)`` of all folds, for `bl.minimize`, from a ``fit`` of one fold.

        Args:
            fit: ``fit(hparams, params0, *rows) -> params`` solves the inner problem of one fold. ``rows`` are the
                training rows of ``args``. ``params0`` is the start: the fold's part of the list of starts, or None.
            args: the arrays of all rows, such as ``(X, y)``.

        Raises:
            TypeError: if ``fit`` cannot be called. The function raises a ValueError if ``params0`` is not a list with a
                start for each fold.

        >>> import numpy as np, bilevel as bl
        >>> X, y = np.eye(4), np.ones(4)
        >>> cv = k_fold(bl.problems.ridge(), [([0, 1], [2, 3]), ([2, 3], [0, 1])])
        >>> def fit(hparams, params0, X, y):
        ...     return np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(hparams)), X.T @ y / len(y))
        >>> cv.fit_each(fit, (X, y))(np.full(4, np.log(0.5)), None)
        [array([0.5, 0.5, 0. , 0. ]), array([0. , 0. , 0.5, 0.5])]
        """
        if not callable(fit):
            raise TypeError(f"fit_each: expected a function fit(hparams, params0, *rows), got {type(fit).__name__}.")
        parts = self.folds.training(args)

        def fit_all(hparams: Any, params0: list[P] | None) -> list[P]:
            starts = self._checked([None] * len(self) if params0 is None else params0, "params0")
            return [fit(hparams, start, *rows) for start, rows in zip(starts, parts, strict=True)]

        return fit_all

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate the maps of all folds at a point."""
        ws = self._checked(params, "params")
        rows, of_hparams = self.folds.training(args), backend.space(hparams)
        at = [self.problem.linearize(backend, w, hparams, part) for w, part in zip(ws, rows, strict=True)]

        def vjp_params(v: Any) -> Any:
            return [fold.vjp_params(part) for fold, part in zip(at, v, strict=True)]

        def vjp_hparams(v: Any) -> H | None:
            products = [fold.vjp_hparams(part) for fold, part in zip(at, v, strict=True)]
            known = [product for product in products if product is not None]
            return reduce(lambda a, b: of_hparams.axpy(1.0, a, b), known) if known else None

        residual: Any = [fold.residual for fold in at]
        forward: Any = [fold.jvp_hparams for fold in at]
        used: Any = [fold.dependence for fold in at]
        return LinearizedMap(
            residual,
            vjp_params,
            vjp_hparams,
            reduction=_reductions([fold.reduction for fold in at]),
            jvp_hparams=None if forward[0] is None else lambda u: [product(u) for product in forward],  # pyright: ignore[reportReturnType]
            dependence=None if used[0] is None else lambda: _joined([dependence() for dependence in used]),
        )

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[Array | None, P]:
        """Return Σₖ Lₖ and the list of ∂Lₖ/∂wₖ. For an equation, return None and the list of residuals."""
        ws, rows = self._checked(params, "params"), self.folds.training(args)
        found = [self.problem.value_and_residual(backend, w, hparams, part) for w, part in zip(ws, rows, strict=True)]
        values = [value for value, _ in found if value is not None]
        residuals: Any = [residual for _, residual in found]
        return reduce(lambda a, b: a + b, values) if values else None, residuals

    def _checked(self, params: Any, name: str) -> Any:
        _check_list(params, len(self), name)
        return params


@dataclass(frozen=True)
class _MeanOverFolds:
    """The outer objective of `k_fold`: 1/K Σₖ Fₖ(wₖ, λ)."""

    outer: Any
    folds: Folds | SplitRows

    def __call__(self, params: list[P], hparams: object, *args: object) -> Any:
        _check_list(params, len(self.folds), "params")
        rows = self.folds.held_out(args)
        values = [self.outer(w, hparams, *part) for w, part in zip(params, rows, strict=True)]
        return reduce(lambda a, b: a + b, values) / len(values)

    def grad(self, params: list[P], hparams: H, *args: object) -> tuple[list[P], H | None]:
        """Return (∂F/∂w, ∂F/∂λ) for the numpy backend. Other backends differentiate the call."""
        count, rows = len(self.folds), self.folds.held_out(args)
        grads = [analytic_grad(self.outer)(w, hparams, *part) for w, part in zip(params, rows, strict=True)]
        direct = [grad for _, grad in grads if grad is not None]
        mean = tree_map(lambda *leaves: sum(leaves) / count, *direct) if direct else None
        return [tree_map(lambda leaf: leaf / count, grad) for grad, _ in grads], mean


def analytic_grad(outer: Any) -> Callable[..., Any]:
    """Return the method ``grad`` of an outer objective. Raise a TypeError if it has none."""
    if not hasattr(outer, "grad"):
        raise TypeError(
            f"the outer objective ({getattr(outer, '__name__', type(outer).__name__)}) has no method 'grad', which the "
            "numpy backend needs: see bilevel.problems.protocols.OuterObjective. The torch and jax backends derive it."
        )
    return outer.grad


def _check_list(params: object, count: int, name: str) -> None:
    """Raise a ValueError unless this is a list with a tree for each fold."""
    if not isinstance(params, list) or len(params) != count:
        got = f"a list of {len(params)}" if isinstance(params, list) else type(params).__name__
        raise ValueError(
            f"{name}: k_fold expects a list of {count} trees, one for each fold, got {got}. To give every fold the "
            f"same start, write [params] * {count}."
        )


def _reductions(found: list[Reduction[Any] | None]) -> Reduction[Any] | None:
    """Return the reduction of the maps of all folds, if they have one."""
    known = [each for each in found if each is not None]
    if not known:
        return None

    def each(name: str) -> Callable[..., Any]:
        parts = [getattr(reduction, name) for reduction in known]
        return lambda *vectors: [part(*entries) for part, *entries in zip(parts, *vectors, strict=True)]

    return Reduction(each("product"), each("rhs"), each("adjoint"), each("kinks"))


def _joined(found: list[Dependence]) -> Dependence:
    """Return the dependence of the maps of all folds. A hyperparameter counts if one fold depends on it."""
    hparams = [any(flags) for flags in zip(*(each.hparams for each in found), strict=True)]
    params = [flag for each in found for flag in each.params]
    return Dependence(params, hparams, max((each.others for each in found), key=len))
