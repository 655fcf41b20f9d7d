"""Linear models with an L2 penalty per weight, per feature or per group of features, or with a shared penalty."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy  # scipy.special loads at its first use

from bilevel.problems.namespace import namespace
from bilevel.problems.problem import Problem
from bilevel.spaces.array import Array


class _DataFit(Protocol):
    """The mean loss of a linear model. X has shape (n, d), dense or scipy.sparse. ``sample_weight`` has shape (n,)."""

    def __call__(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array: ...
    def grad(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array: ...
    def hvp(self, w: Array, v: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array: ...


@dataclass(frozen=True)
class _LeastSquares:
    def __call__(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return 0.5 * _divided(_errors(_scores(X, w), y) ** 2, sample_weight).sum()

    def grad(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return X.T @ _divided(_errors(_scores(X, w), y), sample_weight)

    def hvp(self, w: Array, v: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return X.T @ _divided(X @ v, sample_weight)


@dataclass(frozen=True)
class _CrossEntropy:
    def __call__(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return _divided(_cross_entropies(_scores(X, w), y), sample_weight).sum()

    def grad(self, w: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        errors: Any = _probabilities(_scores(X, w))
        _check_shape(y, errors.shape[:1])
        if w.ndim == 1:
            errors -= y > 0
        else:
            errors[np.arange(len(y)), y] -= 1
        return X.T @ _divided(errors, sample_weight)

    def hvp(self, w: Array, v: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        p: Any = _probabilities(_scores(X, w))
        z = X @ v
        mean = p * z if w.ndim == 1 else (p * z).sum(1, keepdims=True)
        return X.T @ _divided(p * (z - mean), sample_weight)


@dataclass(frozen=True)
class _Penalized:
    """Inner objective: fit(w) + ½ Σ exp(λ) w²."""

    fit: _DataFit
    groups: tuple[int, ...] | None

    def __call__(self, params: Array, hparams: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit(params, X, y, sample_weight) + 0.5 * (self.penalties(params, hparams) * params**2).sum()

    def grad(self, params: Array, hparams: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit.grad(params, X, y, sample_weight) + self.penalties(params, hparams) * params

    def hvp(
        self, params: Array, hparams: Array, vector: Array, X: Array, y: Array, sample_weight: Array | None = None
    ) -> Array:
        return self.fit.hvp(params, vector, X, y, sample_weight) + self.penalties(params, hparams) * vector

    def cross_vjp(
        self, params: Array, hparams: Array, vector: Array, X: Array, y: Array, sample_weight: Array | None = None
    ) -> Array:
        per_weight: Any = self.penalties(params, hparams) * params * vector
        if self.groups is not None:
            per_feature = per_weight.sum(tuple(range(1, params.ndim)))
            free = np.asarray(self.groups) >= 0
            per_group: Any = np.bincount(np.asarray(self.groups)[free], per_feature[free], len(hparams))
            return per_group.astype(hparams.dtype)
        total: Any = np.asarray(per_weight.sum(tuple(range(hparams.ndim, params.ndim))))
        return total

    def cross_jvp(
        self, params: Array, hparams: Array, vector: Array, X: Array, y: Array, sample_weight: Array | None = None
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
            if -1 in self.groups:
                xp = namespace(hparams)
                hparams = xp.concatenate([hparams, xp.zeros_like(hparams[:1])])
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

    def __call__(self, params: Array, hparams: Array, X: Array, y: Array, sample_weight: Array | None = None) -> Array:
        return self.fit(params, X, y, sample_weight)

    def grad(
        self, params: Array, hparams: Array, X: Array, y: Array, sample_weight: Array | None = None
    ) -> tuple[Array, None]:
        return self.fit.grad(params, X, y, sample_weight), None


def ridge(groups: Any = None) -> Problem:
    """Return ridge regression with its penalties as hyperparameters.

    L = ½ mean ‖Xw − y‖² + ½ Σ exp(λ) w² on ``inner_args=(X, y)``, and F = ½ mean ‖Xw − y‖² on
    ``outer_args=(X_val, y_val)``. X has shape (n, d); for NumPy, it may be a scipy.sparse matrix. A third argument
    ``sample_weight`` of shape (n,) makes the mean a weighted mean. ``params`` has shape (d,), or (d, k) for k targets.
    ``hparams`` are log penalties. Their shape is () (shared), (d,) (per feature), the shape of params (per weight), or,
    with ``groups``, (number of groups,).

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(_LeastSquares(), groups)


def logistic_regression(groups: Any = None) -> Problem:
    """Return logistic regression with its penalties as hyperparameters.

    It is `ridge` with the mean cross-entropy. For two classes, ``params`` has shape (d,), and y is 0 or -1 for the
    first class, 1 for the second. For k classes, ``params`` has shape (d, k), and y holds class numbers. For an
    intercept, append a column of ones to X, in group -1.

    Args:
        groups: for each of the d features, the index of its group. Features of group -1 have no penalty, for
            example a column of ones for the intercept.
    """
    return _problem(_CrossEntropy(), groups)


def _problem(fit: _DataFit, groups: Any) -> Problem:
    indices = None if groups is None else tuple(int(g) for g in groups)
    if indices and min(indices) < -1:
        raise ValueError(f"groups: expected indices from 0, or -1 for no penalty, got {min(indices)}.")
    return Problem(_Penalized(fit, indices), _Unpenalized(fit))


def cross_entropy(logits: Any, y: Array) -> Array:
    """Return the mean cross-entropy in any framework, for logits of shape (n, k) or (n,) and y of shape (n,)."""
    return _cross_entropies(logits, y).mean()


def _cross_entropies(logits: Any, y: Array) -> Any:
    xp = namespace(logits)
    _check_shape(y, logits.shape[:1])
    if logits.ndim == 1:
        return xp.logaddexp(xp.zeros_like(logits), xp.where(y > 0, -logits, logits))
    top = xp.amax(logits, axis=1, keepdims=True)
    log_total = xp.log(xp.exp(logits - top).sum(1)) + top[:, 0]
    return log_total - logits[np.arange(len(y)), y]


def _divided(terms: Any, sample_weight: Any) -> Any:
    """Return the terms of the examples, of shape (n, ...), divided by n or multiplied by their share of the weights."""
    if sample_weight is None:
        return terms / terms.shape[0]
    _check_shape(sample_weight, terms.shape[:1], "sample_weight")
    share = sample_weight / sample_weight.sum()
    return terms * share.reshape(-1, *(1,) * (terms.ndim - 1))


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


def _check_shape(y: Array, shape: Any, name: str = "y") -> None:
    """Raise a ValueError for targets that would broadcast to a wrong loss, such as y[:, None] against (n,).

    Raise a TypeError for names of classes.
    """
    labels: Any = y
    if isinstance(y, np.ndarray) and labels.dtype.kind in "US":
        raise TypeError(
            f"y: expected numbers, got {labels.dtype}. Encode names of classes, as LabelEncoder of scikit-learn does."
        )
    if tuple(np.shape(y)) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, with the rows of X, got {tuple(np.shape(y))}.")
