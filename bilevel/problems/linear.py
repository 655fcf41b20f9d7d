"""Linear models with an L2 penalty per weight, per feature or per group of features, or with a shared penalty."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bilevel.problems.losses import CrossEntropy, Huber, LeastSquares, Loss, Poisson, SquaredHinge, check_shape
from bilevel.problems.problem import Problem
from bilevel.prox.groups import Groups, gathered, summed
from bilevel.spaces.array import Array
from bilevel.spaces.namespace import namespace


@dataclass(frozen=True)
class DataFit:
    """The mean loss of a linear model. X has shape (n, d), dense or scipy.sparse.

    With ``sample_weight`` of shape (n,), it is the weighted mean: an example of weight 2 counts as two examples.
    """

    loss: Loss

    def __call__(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return _divided(self.loss(_scores(X, w), y), sample_weight).sum()

    def grad(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return X.T @ _divided(self.loss.slopes(_scores(X, w), y), sample_weight)

    def hvp(self, w: Array, v: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        dz = X @ v
        z = dz if self.loss.constant_curvature else X @ w
        return X.T @ _divided(self.loss.bend(z, y, dz), sample_weight)

    def hvp_on(
        self, support: Any, w: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Callable[[Any], Any]:
        """Return v -> the Hessian-vector product for v that are zero outside of the support, a mask like w.

        The result is zero outside of the support too.
        """
        rows = support if support.ndim == 1 else support.any(1)
        columns, z = X[:, rows], _scores(X, w)

        def product(v: Any) -> Any:
            result = np.zeros_like(v)
            result[rows] = columns.T @ _divided(self.loss.bend(z, y, columns @ v[rows]), sample_weight)
            return result

        return product


@dataclass(frozen=True)
class _Penalized:
    """Inner objective: fit(w) + ½ Σ exp(λ) w²."""

    fit: DataFit
    groups: Groups | None

    def __call__(self, params: Array, hparams: Array, X: Any, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit(params, X, y, sample_weight) + 0.5 * (self.penalties(params, hparams) * params**2).sum()

    def grad(self, params: Array, hparams: Array, X: Any, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit.grad(params, X, y, sample_weight) + self.penalties(params, hparams) * params

    def hvp(
        self, params: Array, hparams: Array, vector: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Array:
        return self.fit.hvp(params, vector, X, y, sample_weight) + self.penalties(params, hparams) * vector

    def cross_vjp(
        self, params: Array, hparams: Array, vector: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Array:
        per_weight: Any = self.penalties(params, hparams) * params * vector
        if self.groups is not None:
            return summed(per_weight, self.groups, len(hparams))
        total: Any = np.asarray(per_weight.sum(tuple(range(hparams.ndim, params.ndim))))
        return total

    def cross_jvp(
        self, params: Array, hparams: Array, vector: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> Array:
        return self.penalties(params, hparams) * self.spread(params, vector) * params

    def penalties(self, params: Array, hparams: Array) -> Array:
        """Return exp(λ) in a shape that broadcasts to the shape of params. It is 0 for features of group -1."""
        if not hasattr(hparams, "ndim"):
            raise TypeError(f"hparams: expected one array of log penalties, got {type(hparams).__name__}.")
        return self.spread(params, namespace(hparams).exp(hparams))

    def spread(self, params: Array, hparams: Array) -> Array:
        """Return a vector like λ, in a shape that broadcasts to params. It is 0 for features of group -1."""
        if self.groups is not None:
            hparams = gathered(hparams, self.groups)
        if tuple(hparams.shape) != tuple(params.shape[: hparams.ndim]):
            raise ValueError(
                f"hparams: expected log penalties of shape () (shared), {tuple(params.shape[:1])} (per feature) or "
                f"{tuple(params.shape)} (per weight), got {tuple(hparams.shape)}. Penalties per group need groups=."
            )
        return hparams.reshape(*hparams.shape, *(1,) * (params.ndim - hparams.ndim))


@dataclass(frozen=True)
class Unpenalized:
    """Outer objective: fit(w)."""

    fit: DataFit

    def __call__(self, params: Array, hparams: Array, X: Any, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit(params, X, y, sample_weight)

    def grad(
        self, params: Array, hparams: Array, X: Any, y: Array, sample_weight: Array | None = None
    ) -> tuple[Array, None]:
        return self.fit.grad(params, X, y, sample_weight), None


def ridge(groups: Any = None) -> Problem:
    """Return ridge regression with its penalties as hyperparameters.

    L = ½ mean ‖Xw − y‖² + ½ Σ exp(λ) w² on ``inner_args=(X, y)``, and F = ½ mean ‖Xw − y‖² on
    ``outer_args=(X_val, y_val)``. X has shape (n, d); for NumPy, it may be a scipy.sparse matrix. ``params`` has shape
    (d,), or (d, k) for k targets. ``hparams`` are log penalties. Their shape is () (shared), (d,) (per feature), the
    shape of params (per weight), or, with ``groups``, (number of groups,). A third argument in ``inner_args`` or
    ``outer_args``, ``sample_weight`` of shape (n,), makes the mean a weighted mean.

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(LeastSquares(), groups)


def logistic_regression(groups: Any = None) -> Problem:
    """Return logistic regression with its penalties as hyperparameters.

    It is `ridge` with the mean cross-entropy. For two classes, ``params`` has shape (d,), and y is 0 or -1 for the
    first class, 1 for the second. For k classes, ``params`` has shape (d, k), and y holds class numbers. For an
    intercept, append a column of ones to X, in group -1.

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(CrossEntropy(), groups)


def svm(groups: Any = None) -> Problem:
    """Return a linear support vector machine with the squared hinge loss, and its penalties as hyperparameters.

    It is `ridge` with the loss ½ max(0, 1 − t xᵀw)², where t is 1 for y > 0 and −1 for other y. ``params`` has shape
    (d,). Scikit-learn's ``LinearSVC(C, fit_intercept=False)`` has the same minimum for C = 1/(2 n exp(λ)).

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(SquaredHinge(), groups)


def huber(groups: Any = None, *, threshold: float = 1.35) -> Problem:
    """Return Huber's robust regression with its penalties as hyperparameters.

    It is `ridge` with the loss ½ e² for |e| ≤ threshold and threshold (|e| − ½ threshold) for larger errors e = xᵀw − y
    (Huber 1964). ``params`` has shape (d,).

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
        threshold: the largest error that is squared, in the units of y, > 0.

    Raises:
        ValueError: if ``threshold`` is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"huber: expected a threshold > 0, got {threshold!r}.")
    return _problem(Huber(threshold), groups)


def poisson(groups: Any = None) -> Problem:
    """Return Poisson regression with its penalties as hyperparameters.

    It is `ridge` with the loss exp(xᵀw) − y xᵀw, for counts y ≥ 0 with the mean exp(xᵀw). ``params`` has shape (d,).
    Scikit-learn's ``PoissonRegressor(alpha, fit_intercept=False)`` has the same minimum for alpha = exp(λ).

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(Poisson(), groups)


def _problem(loss: Loss, groups: Any) -> Problem:
    indices = None if groups is None else Groups(int(g) for g in groups)
    if indices and indices.lowest < -1:
        raise ValueError(f"groups: expected indices from 0, or -1 for no penalty, got {indices.lowest}.")
    fit = DataFit(loss)
    return Problem(_Penalized(fit, indices), Unpenalized(fit))


class Penalties(NamedTuple):
    """The penalties of a ready linear model in NumPy.

    Attributes:
        loss: the loss of an example.
        of: (params, hparams) -> (l1, l2), the penalties of each weight, in the shape of params.
        step_size: of the proximal step, else 0. The matrix of the linear system is H + diag(l2), with rows and columns
            divided by 1 + step_size l2.
    """

    loss: Loss
    of: Callable[[Any, Any], tuple[Any, Any]]
    step_size: float


def linear_model(problem: Any) -> Penalties:
    """Return the loss and the penalties of a ready linear model.

    Raises:
        TypeError: if the problem is no ready linear model.
    """
    smooth, prox = getattr(problem, "smooth", None), getattr(problem, "prox", None)
    inner = getattr(problem, "inner", None)
    if hasattr(prox, "penalties") and isinstance(getattr(smooth, "fit", None), DataFit):
        return Penalties(smooth.fit.loss, prox.penalties, problem.step_size)  # pyright: ignore[reportOptionalMemberAccess]
    if not isinstance(inner, _Penalized):
        raise TypeError(
            "newton_fit: expected a ready linear model, such as bl.problems.ridge(), or bl.problems.k_fold of one, got "
            f"{type(problem).__name__}. For other smooth problems, use bl.scipy_fit, and for other proximal problems "
            "bl.proximal_fit."
        )

    def penalties(params: Array, hparams: Any) -> tuple[Any, Any]:
        l2 = np.broadcast_to(np.asarray(inner.penalties(params, hparams)), params.shape)
        return np.zeros_like(l2), l2

    return Penalties(inner.fit.loss, penalties, 0.0)


def cross_entropy(logits: Any, y: Array) -> Array:
    """Return the mean cross-entropy in any framework, for logits of shape (n, k) or (n,) and y of shape (n,)."""
    losses: Any = CrossEntropy()(logits, y)
    return losses.mean()


def _scores(X: Array, w: Array) -> Array:
    """Return X @ w. Raise a ValueError with names if the shapes do not fit."""
    if not hasattr(w, "ndim"):
        raise TypeError(f"params: expected one array of weights, got {type(w).__name__}.")
    d = X.shape[-1]
    if w.ndim not in (1, 2) or w.shape[0] != d:
        raise ValueError(
            f"params: expected shape ({d},) or ({d}, k), a row for each column of X, got {tuple(w.shape)}. From "
            "scikit-learn, pass coef_[0], or coef_.T for several targets or classes."
        )
    return X @ w


def _divided(terms: Any, sample_weight: Any) -> Any:
    """Return the terms of the examples, of shape (n, ...), divided by n or multiplied by their share of the weights."""
    if sample_weight is None:
        return terms / terms.shape[0]
    check_shape(sample_weight, terms.shape[:1], "sample_weight")
    shares = sample_weight / sample_weight.sum()
    return terms * shares.reshape(-1, *(1,) * (terms.ndim - 1))
