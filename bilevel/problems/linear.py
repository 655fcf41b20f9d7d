"""Linear models with an L2 penalty per weight, per feature or per group of features, or with a shared penalty."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy  # scipy.special loads at its first use

from bilevel.problems.problem import Problem
from bilevel.spaces.array import Array
from bilevel.spaces.namespace import namespace


class _DataFit(Protocol):
    """The mean loss of a linear model; X has shape (n, d), dense or scipy.sparse."""

    def __call__(self, w: Array, X: Array, y: Array) -> Array: ...
    def grad(self, w: Array, X: Array, y: Array) -> Array: ...
    def hvp(self, w: Array, v: Array, X: Array, y: Array) -> Array: ...


@dataclass(frozen=True)
class _LeastSquares:
    def __call__(self, w: Array, X: Array, y: Array) -> Array:
        return 0.5 * (_errors(_scores(X, w), y) ** 2).sum() / len(y)

    def grad(self, w: Array, X: Array, y: Array) -> Array:
        return X.T @ _errors(_scores(X, w), y) / len(y)

    def hvp(self, w: Array, v: Array, X: Array, y: Array) -> Array:
        return X.T @ (X @ v) / len(y)


@dataclass(frozen=True)
class _CrossEntropy:
    def __call__(self, w: Array, X: Array, y: Array) -> Array:
        return cross_entropy(_scores(X, w), y)

    def grad(self, w: Array, X: Array, y: Array) -> Array:
        errors: Any = _probabilities(_scores(X, w))
        _check_shape(y, errors.shape[:1])
        if w.ndim == 1:
            errors -= y > 0
        else:
            errors[np.arange(len(y)), y] -= 1
        return X.T @ errors / len(y)

    def hvp(self, w: Array, v: Array, X: Array, y: Array) -> Array:
        p: Any = _probabilities(_scores(X, w))
        z = X @ v
        mean = p * z if w.ndim == 1 else (p * z).sum(1, keepdims=True)
        return X.T @ (p * (z - mean)) / len(y)


@dataclass(frozen=True)
class _Penalized:
    """Inner objective: fit(w) + ½ Σ exp(λ) w²."""

    fit: _DataFit
    groups: tuple[int, ...] | None

    def __call__(self, params: Array, hparams: Array, X: Array, y: Array) -> Array:
        return self.fit(params, X, y) + 0.5 * (self.penalties(params, hparams) * params**2).sum()

    def grad(self, params: Array, hparams: Array, X: Array, y: Array) -> Array:
        return self.fit.grad(params, X, y) + self.penalties(params, hparams) * params

    def hvp(self, params: Array, hparams: Array, vector: Array, X: Array, y: Array) -> Array:
        return self.fit.hvp(params, vector, X, y) + self.penalties(params, hparams) * vector

    def cross_vjp(self, params: Array, hparams: Array, vector: Array, X: Array, y: Array) -> Array:
        per_weight: Any = self.penalties(params, hparams) * params * vector
        if self.groups is not None:
            per_feature = per_weight.sum(tuple(range(1, params.ndim)))
            per_group: Any = np.bincount(self.groups, per_feature, len(hparams))
            return per_group.astype(hparams.dtype)
        total: Any = np.asarray(per_weight.sum(tuple(range(hparams.ndim, params.ndim))))
        return total

    def cross_jvp(self, params: Array, hparams: Array, vector: Array, X: Array, y: Array) -> Array:
        return self.penalties(params, hparams) * self.spread(params, vector) * params

    def penalties(self, params: Array, hparams: Array) -> Array:
        """Return exp(λ) in a shape that broadcasts to the shape of params."""
        hparams = self.spread(params, hparams)
        return namespace(hparams).exp(hparams)

    def spread(self, params: Array, hparams: Array) -> Array:
        """Return λ, or a vector like λ, in a shape that broadcasts to the shape of params."""
        if not hasattr(hparams, "ndim"):
            raise TypeError(f"hparams: expected one array of log penalties, got {type(hparams).__name__}.")
        if self.groups is not None:
            hparams = hparams[np.asarray(self.groups)]
        if tuple(hparams.shape) != tuple(params.shape[: hparams.ndim]):
            raise ValueError(
                f"hparams: expected log penalties of shape () (shared), {tuple(params.shape[:1])} (per feature) or "
                f"{tuple(params.shape)} (per weight), got {tuple(hparams.shape)}. Penalties per group need groups=."
            )
        return hparams.reshape(*hparams.shape, *(1,) * (params.ndim - hparams.ndim))


@dataclass(frozen=True)
class _Unpenalized:
    """Outer objective: fit(w)."""

    fit: _DataFit

    def __call__(self, params: Array, hparams: Array, X: Array, y: Array) -> Array:
        return self.fit(params, X, y)

    def grad(self, params: Array, hparams: Array, X: Array, y: Array) -> tuple[Array, None]:
        return self.fit.grad(params, X, y), None


def ridge(groups: Any = None) -> Problem:
    """Return ridge regression with its penalties as hyperparameters.

    L = ½ mean ‖Xw − y‖² + ½ Σ exp(λ) w² on ``inner_args=(X, y)``, and F = ½ mean ‖Xw − y‖² on
    ``outer_args=(X_val, y_val)``. X has shape (n, d); for NumPy, it may be a scipy.sparse matrix. ``params`` has shape
    (d,), or (d, k) for k targets. ``hparams`` are log penalties. Their shape is () (shared), (d,) (per feature), the
    shape of params (per weight), or, with ``groups``, (number of groups,).

    Args:
        groups: for each of the d features, the index of its group.
    """
    return _problem(_LeastSquares(), groups)


def logistic_regression(groups: Any = None) -> Problem:
    """Return logistic regression with its penalties as hyperparameters.

    It is `ridge` with the mean cross-entropy. For two classes, ``params`` has shape (d,), and y is 0 or -1 for the
    first class, 1 for the second. For k classes, ``params`` has shape (d, k), and y holds class numbers. For an
    intercept, append a column of ones to X.

    Args:
        groups: for each of the d features, the index of its group.
    """
    return _problem(_CrossEntropy(), groups)


def _problem(fit: _DataFit, groups: Any) -> Problem:
    indices = None if groups is None else tuple(int(g) for g in groups)
    return Problem(_Penalized(fit, indices), _Unpenalized(fit))


def cross_entropy(logits: Any, y: Array) -> Array:
    """Return the mean cross-entropy in any framework, for logits of shape (n, k) or (n,) and y of shape (n,)."""
    xp = namespace(logits)
    _check_shape(y, logits.shape[:1])
    if logits.ndim == 1:
        return xp.logaddexp(xp.zeros_like(logits), xp.where(y > 0, -logits, logits)).mean()
    top = xp.amax(logits, axis=1, keepdims=True)
    log_total = xp.log(xp.exp(logits - top).sum(1)) + top[:, 0]
    return (log_total - logits[np.arange(len(y)), y]).mean()


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


def _probabilities(logits: Any) -> Array:
    """Return the softmax of logits of shape (n, k), or the probability of the second class of logits of shape (n,)."""
    if logits.ndim == 1:
        return scipy.special.expit(logits)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _errors(prediction: Any, y: Array) -> Array:
    _check_shape(y, prediction.shape)
    return prediction - y


def _check_shape(y: Array, shape: Any) -> None:
    """Raise a ValueError for targets that would broadcast to a wrong loss, such as y[:, None] against (n,).

    Raise a TypeError for names of classes.
    """
    labels: Any = y
    if isinstance(y, np.ndarray) and labels.dtype.kind in "US":
        raise TypeError(
            f"y: expected numbers, got {labels.dtype}. Encode names of classes, as LabelEncoder of scikit-learn does."
        )
    if tuple(np.shape(y)) != tuple(shape):
        raise ValueError(f"y: expected shape {tuple(shape)}, with the rows of X, got {tuple(np.shape(y))}.")
