"""Quadratics, whose hypergradient is known in closed form."""

from dataclasses import dataclass
from typing import Any

from bilevel.problems.problem import Problem


@dataclass(frozen=True, eq=False)
class _Inner:
    hessian: Any
    coupling: Any
    offset: Any

    def __call__(self, params: Any, hparams: Any) -> Any:
        return params @ (0.5 * (self.hessian @ params) - self.coupling @ hparams - self.offset)

    def grad(self, params: Any, hparams: Any) -> Any:
        return self.hessian @ params - self.coupling @ hparams - self.offset

    def hvp(self, params: Any, hparams: Any, vector: Any) -> Any:
        return self.hessian @ vector

    def cross_vjp(self, params: Any, hparams: Any, vector: Any) -> Any:
        return -(self.coupling.T @ vector)

    def cross_jvp(self, params: Any, hparams: Any, vector: Any) -> Any:
        return -(self.coupling @ vector)


@dataclass(frozen=True, eq=False)
class _Outer:
    target: Any
    direct: Any

    def __call__(self, params: Any, hparams: Any) -> Any:
        miss = params - self.target
        return 0.5 * (miss @ miss) + (self.direct * hparams).sum()

    def grad(self, params: Any, hparams: Any) -> tuple[Any, Any]:
        return params - self.target, self.direct + 0 * hparams


def quadratic(hessian: Any, coupling: Any, target: Any, offset: Any = 0.0, direct: Any = 0.0) -> Problem:
    """Return L = ½ wᵀHw − wᵀ(Bλ + c) and F = ½‖w − t‖² + dᵀλ.

    The minimizer is w* = H⁻¹(Bλ + c), the hypergradient there d + BᵀH⁻¹(w* − t). A Hessian that is not positive
    definite makes a problem without a minimum, to test solvers with.

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
