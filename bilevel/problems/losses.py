"""Losses of linear predictions z = Xw, with derivatives by z. The values are for every framework."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy  # scipy.special loads at its first use

from bilevel.spaces.namespace import namespace


class Loss(ABC):
    """The loss of each example, for predictions z of shape (n,) or (n, k).

    Attributes:
        constant_curvature: whether ∂²loss/∂z² does not depend on z.
    """

    constant_curvature: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, z: Any, y: Any) -> Any:
        """Return the losses, of shape (n,)."""
        raise NotImplementedError

    @abstractmethod
    def slopes(self, z: Any, y: Any) -> Any:
        """Return ∂loss/∂z, with the shape of z."""
        raise NotImplementedError

    @abstractmethod
    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        """Return (∂²loss/∂z²) dz, with the shape of z."""
        raise NotImplementedError


@dataclass(frozen=True)
class LeastSquares(Loss):
    """½ (z − y)², summed over k targets."""

    constant_curvature = True

    def __call__(self, z: Any, y: Any) -> Any:
        squares = 0.5 * self.slopes(z, y) ** 2
        return squares if z.ndim == 1 else squares.sum(1)

    def slopes(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape)
        return z - y

    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        return dz


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """The cross-entropy of the classes: y > 0 is the second of two for z of shape (n,), else y holds class numbers."""

    def __call__(self, z: Any, y: Any) -> Any:
        xp = namespace(z)
        check_shape(y, z.shape[:1])
        if z.ndim == 1:
            return xp.logaddexp(xp.zeros_like(z), xp.where(y > 0, -z, z))
        top = xp.amax(z, axis=1, keepdims=True)
        log_total = xp.log(xp.exp(z - top).sum(1)) + top[:, 0]
        return log_total - z[np.arange(len(y)), y]

    def slopes(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape[:1])
        errors = _probabilities(z)
        if z.ndim == 1:
            return errors - (y > 0)
        errors[np.arange(len(y)), y] -= 1
        return errors

    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        p = _probabilities(z)
        return p * (dz - (p * dz if z.ndim == 1 else (p * dz).sum(1, keepdims=True)))


@dataclass(frozen=True)
class SquaredHinge(Loss):
    """½ max(0, 1 − t z)², with t = 1 where y > 0 and t = −1 elsewhere. Its second derivative jumps at t z = 1."""

    def __call__(self, z: Any, y: Any) -> Any:
        xp = namespace(z)
        check_shape(y, z.shape)
        margin = 1 - xp.where(y > 0, z, -z)
        return 0.5 * xp.where(margin > 0, margin, xp.zeros_like(z)) ** 2

    def slopes(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape)
        sign = np.where(y > 0, z.dtype.type(1), z.dtype.type(-1))
        return -sign * np.maximum(1 - sign * z, 0)

    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        return np.where(np.where(y > 0, z, -z) < 1, dz, 0)


@dataclass(frozen=True)
class Huber(Loss):
    """½ e² where |e| ≤ threshold, else threshold (|e| − ½ threshold), with e = z − y (Huber 1964)."""

    threshold: float = 1.35

    def __call__(self, z: Any, y: Any) -> Any:
        xp = namespace(z)
        check_shape(y, z.shape)
        error = abs(z - y)
        inside = xp.where(error < self.threshold, error, xp.zeros_like(z) + self.threshold)
        return inside * (error - 0.5 * inside)

    def slopes(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape)
        return np.clip(z - y, -self.threshold, self.threshold)

    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        return np.where(abs(z - y) < self.threshold, dz, 0)


@dataclass(frozen=True)
class Poisson(Loss):
    """exp(z) − y z: minus the log-likelihood of counts y with the mean exp(z), without the term of y alone."""

    def __call__(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape)
        return namespace(z).exp(z) - y * z

    def slopes(self, z: Any, y: Any) -> Any:
        check_shape(y, z.shape)
        return np.exp(z) - y

    def bend(self, z: Any, y: Any, dz: Any) -> Any:
        return np.exp(z) * dz


def _probabilities(z: Any) -> Any:
    """Return the softmax of z of shape (n, k), or the probability of the second class for z of shape (n,)."""
    if z.ndim == 1:
        return scipy.special.expit(z)
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def check_shape(y: Any, shape: Any, name: str = "y") -> None:
    """Raise a ValueError for targets that would broadcast to a wrong loss, such as y[:, None] against (n,).

    Raise a TypeError for names of classes.
    """
    if isinstance(y, np.ndarray) and y.dtype.kind in "US":
        raise TypeError(
            f"y: expected numbers, got {y.dtype}. Encode names of classes, as LabelEncoder of scikit-learn does."
        )
    if tuple(np.shape(y)) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, with the rows of X, got {tuple(np.shape(y))}.")
