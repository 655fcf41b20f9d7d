"""Quadratic problems, whose hypergradient has a closed form."""

from dataclasses import dataclass
from typing import Any

from bilevel.problems.problem import Problem
from bilevel.spaces.array import Array


@dataclass(frozen=True, eq=False)
class _Inner:
    hessian: Array
    coupling: Array
    offset: Array

    def __call__(self, params: Array, hparams: Array) -> Array:
        return params @ (0.5 * (self.hessian @ params) - self.coupling @ hparams - self.offset)

    def grad(self, params: Array, hparams: Array) -> Array:
        return self.hessian @ params - self.coupling @ hparams - self.offset

    def hvp(self, params: Array, hparams: Array, vector: Array) -> Array:
        return self.hessian @ vector

    def cross_vjp(self, params: Array, hparams: Array, vector: Array) -> Array:
        return -(self.coupling.T @ vector)

    def cross_jvp(self, params: Array, hparams: Array, vector: Array) -> Array:
        return -(self.coupling @ vector)


@dataclass(frozen=True, eq=False)
class _Outer:
    target: Array
    direct: Array

    def __call__(self, params: Array, hparams: Array) -> Array:
        miss = params - self.target
        return 0.5 * (miss @ miss) + (self.direct * hparams).sum()

    def grad(self, params: Array, hparams: Array) -> tuple[Array, Array]:
        return params - self.target, self.direct + 0 * hparams


def quadratic(hessian: Any, coupling: Any, target: Any, offset: Any = 0.0, direct: Any = 0.0) -> Problem:
    """Return L = ½ wᵀHw − wᵀ(Bλ + c) and F = ½‖w − t‖² + dᵀλ.

    The minimizer is w* = H⁻¹(Bλ + c), and its hypergradient is d + BᵀH⁻¹(w* − t). To test solvers on problems without
    a minimum, pass a Hessian that is not positive definite.

    Args:
        hessian: H, symmetric, of shape (n, n).
        coupling: B, of shape (n, m) for params of shape (n,) and hparams of shape (m,).
        target: t, of shape (n,).
        offset: c, of shape (n,) or a number.
        direct: d, of shape (m,) or a number.

    >>> import numpy as np
    >>> problem = quadratic(hessian=2 * np.eye(1), coupling=np.ones((1, 1)), target=np.zeros(1))
    >>> problem.inner.hvp(np.ones(1), np.ones(1), np.ones(1))
    array([2.])
    """
    return Problem(_Inner(hessian, coupling, offset), _Outer(target, direct))
