"""Problems with analytic derivatives, whose data are arguments so that JAX compiles them once."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg

from bilevel.backend import Backend
from bilevel.problems.problem import Problem
from bilevel.spaces.array import Array
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.testing.conformance.subject import make_array
from bilevel.testing.conformance.systems import SIZE, normal, symmetric

HYPERS = 3


@dataclass(frozen=True)
class _Inner:
    """L = ½ wᵀHw − wᵀ(Bλ + c)."""

    def __call__(self, w: Array, h: Array, H: Array, B: Array, c: Array) -> Array:
        return w @ (0.5 * (H @ w) - B @ h - c)

    def grad(self, w: Array, h: Array, H: Array, B: Array, c: Array) -> Array:
        return H @ w - B @ h - c

    def hvp(self, w: Array, h: Array, v: Array, H: Array, B: Array, c: Array) -> Array:
        return H @ v

    def cross_vjp(self, w: Array, h: Array, v: Array, H: Array, B: Array, c: Array) -> Array:
        return -(B.T @ v)

    def cross_jvp(self, w: Array, h: Array, u: Array, H: Array, B: Array, c: Array) -> Array:
        return -(B @ u)


@dataclass(frozen=True)
class _InnerAlone:
    """L = ½ wᵀHw − wᵀc + λᵀλ. ∂L/∂w does not depend on λ."""

    def __call__(self, w: Array, h: Array, H: Array, B: Array, c: Array) -> Array:
        return w @ (0.5 * (H @ w) - c) + (h * h).sum()

    def grad(self, w: Array, h: Array, H: Array, B: Array, c: Array) -> Array:
        return H @ w - c

    def hvp(self, w: Array, h: Array, v: Array, H: Array, B: Array, c: Array) -> Array:
        return H @ v

    def cross_vjp(self, w: Array, h: Array, v: Array, H: Array, B: Array, c: Array) -> None:
        return None


@dataclass(frozen=True)
class _Outer:
    """F = ½‖w − t‖² + dᵀλ."""

    def __call__(self, w: Array, h: Array, t: Array, d: Array) -> Array:
        return 0.5 * ((w - t) @ (w - t)) + d @ h

    def grad(self, w: Array, h: Array, t: Array, d: Array) -> tuple[Array, Array]:
        return w - t, d


@dataclass(frozen=True)
class _OuterAlone:
    """F = ½‖w − t‖², without λ."""

    def __call__(self, w: Array, h: Array, t: Array, d: Array) -> Array:
        return 0.5 * ((w - t) @ (w - t))

    def grad(self, w: Array, h: Array, t: Array, d: Array) -> tuple[Array, None]:
        return w - t, None


@dataclass(frozen=True)
class _TreeInner:
    """L = Σ k (½w² − wλ), for trees k, w and λ of one structure."""

    def __call__(self, w: Array, h: Array, k: Array) -> Array:
        return _total(tree_map(lambda w, h, k: (k * (w * w / 2 - w * h)).sum(), w, h, k))

    def grad(self, w: Array, h: Array, k: Array) -> Array:
        return tree_map(lambda w, h, k: k * (w - h), w, h, k)

    def hvp(self, w: Array, h: Array, v: Array, k: Array) -> Array:
        return tree_map(lambda k, v: k * v, k, v)

    def cross_vjp(self, w: Array, h: Array, v: Array, k: Array) -> Array:
        return tree_map(lambda k, v: -k * v, k, v)

    def cross_jvp(self, w: Array, h: Array, u: Array, k: Array) -> Array:
        return tree_map(lambda k, u: -k * u, k, u)


@dataclass(frozen=True)
class _TreeOuter:
    """F = ½ Σ (w − t)²."""

    def __call__(self, w: Array, h: Array, t: Array) -> Array:
        return _total(tree_map(lambda w, t: ((w - t) * (w - t)).sum() / 2, w, t))

    def grad(self, w: Array, h: Array, t: Array) -> tuple[Array, None]:
        return tree_map(lambda w, t: w - t, w, t), None


@dataclass(frozen=True)
class _CurvedInner:
    """L = Σ ½ (1 + λ²) w² + ¼ w⁴ − w, for trees w and λ of one structure."""

    def __call__(self, w: Array, h: Array) -> Array:
        return _total(tree_map(lambda w, h: ((1 + h * h) * w * w / 2 + w * w * w * w / 4 - w).sum(), w, h))

    def grad(self, w: Array, h: Array) -> Array:
        return tree_map(lambda w, h: (1 + h * h) * w + w * w * w - 1, w, h)

    def hvp(self, w: Array, h: Array, v: Array) -> Array:
        return tree_map(lambda w, h, v: (1 + h * h + 3 * w * w) * v, w, h, v)

    def cross_vjp(self, w: Array, h: Array, v: Array) -> Array:
        return tree_map(lambda w, h, v: 2 * h * w * v, w, h, v)

    def cross_jvp(self, w: Array, h: Array, u: Array) -> Array:
        return tree_map(lambda w, h, u: 2 * h * w * u, w, h, u)


@dataclass(frozen=True)
class _CurvedOuter:
    """F = ½ Σ (1 + λ) (w − t)²."""

    def __call__(self, w: Array, h: Array, t: Array) -> Array:
        return _total(tree_map(lambda w, h, t: ((1 + h) * (w - t) * (w - t)).sum() / 2, w, h, t))

    def grad(self, w: Array, h: Array, t: Array) -> tuple[Array, Array]:
        in_w = tree_map(lambda w, h, t: (1 + h) * (w - t), w, h, t)
        return in_w, tree_map(lambda w, t: (w - t) * (w - t) / 2, w, t)


QUADRATIC = Problem(_Inner(), _Outer())
NO_DIRECT_TERM = Problem(_Inner(), _OuterAlone())
NO_CROSS_TERM = Problem(_InnerAlone(), _Outer())
TREES = Problem(_TreeInner(), _TreeOuter())
CURVED = Problem(_CurvedInner(), _CurvedOuter())


class QuadraticPoint(NamedTuple):
    """A point of `QUADRATIC`, `NO_DIRECT_TERM` or `NO_CROSS_TERM`, with the closed form there in NumPy's float64.

    Attributes:
        arguments: params, hparams, inner_args and outer_args in a framework.
        params, hparams, hessian, coupling, offset, target, direct: w, λ, H, B, c, t and d, rounded to the dtype.
        damping: δ, which the solver adds to H.
    """

    arguments: dict[str, Any]
    params: np.ndarray
    hparams: np.ndarray
    hessian: np.ndarray
    coupling: np.ndarray
    offset: np.ndarray
    target: np.ndarray
    direct: np.ndarray
    damping: float

    @property
    def value(self) -> float:
        """Return F."""
        return self.value_at(self.params)

    @property
    def rhs(self) -> np.ndarray:
        """Return ∂F/∂w."""
        return self.params - self.target

    @property
    def adjoint(self) -> np.ndarray:
        """Return (H + δI)⁻¹ ∂F/∂w."""
        return self.adjoint_at(self.params)

    @property
    def grad(self) -> np.ndarray:
        """Return dF/dλ = d + Bᵀ (H + δI)⁻¹ ∂F/∂w."""
        return self.direct + self.coupling.T @ self.adjoint

    def value_at(self, w: np.ndarray) -> float:
        """Return F(w, λ)."""
        return float(0.5 * np.sum((w - self.target) ** 2) + self.direct @ self.hparams)

    def adjoint_at(self, w: np.ndarray) -> np.ndarray:
        """Return (H + δI)⁻¹ ∂F/∂w at w."""
        return linalg.solve(self.hessian + self.damping * np.eye(w.size), w - self.target)


def quadratic_point(
    backend: Backend,
    dtype: str,
    *,
    eigenvalues: Any = None,
    damping: float = 0.0,
    at_minimum: bool = True,
    seed: int = 0,
) -> QuadraticPoint:
    """Return a point of the quadratic problem.

    Args:
        backend: the backend of its arrays.
        dtype: the dtype of its arrays.
        eigenvalues: the eigenvalues of H + damping · I; default: from 1 to 4.
        damping: the damping of the solver.
        at_minimum: whether params minimize L.
        seed: the seed of the random numbers.
    """
    eigenvalues = np.linspace(1.0, 4.0, SIZE) if eigenvalues is None else np.asarray(eigenvalues)
    n = eigenvalues.size
    H = symmetric(eigenvalues, seed) - damping * np.eye(n)
    B, c, t = normal(seed + 1, n, HYPERS), normal(seed + 2, n), normal(seed + 3, n)
    d, lam = normal(seed + 4, HYPERS), normal(seed + 5, HYPERS)
    w = linalg.solve(H, B @ lam + c) if at_minimum else normal(seed + 6, n)
    arrays = [make_array(backend, a, dtype) for a in (w, lam, H, B, c, t, d)]
    w_, lam_, H_, B_, c_, t_, d_ = arrays
    truth = [
        backend.to_flat(array).reshape(np.shape(a)) for array, a in zip(arrays, (w, lam, H, B, c, t, d), strict=True)
    ]
    arguments = {"params": w_, "hparams": lam_, "inner_args": (H_, B_, c_), "outer_args": (t_, d_)}
    return QuadraticPoint(arguments, *truth, damping=damping)


def _total(tree: Any) -> Any:
    return sum(leaf for _, leaf in leaves_with_paths(tree))
