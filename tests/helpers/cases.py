"""Problems with known answers, at a point: one place for what the tests differentiate."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from frameworks import framework, symmetric

import bilevel as bl
from bilevel.testing.conformance.problems import QUADRATIC


@dataclass(frozen=True)
class Case:
    """A problem at a point, its arrays in a framework, and the answers in NumPy's float64 where a closed form has them.

    Attributes:
        problem: the problem.
        params: where it is differentiated.
        hparams: where it is differentiated.
        args: ``inner_args`` and ``outer_args``.
        matrix: the Hessian ∂²L/∂w², or the Jacobian ∂r/∂w of an equation.
        coupling: B.
        target: t, where F is smallest.
        minimum: w*.
        adjoint: v at params.
        grad: dF/dλ at params.
        value: F at params.
    """

    problem: Any
    params: Any
    hparams: Any
    args: dict[str, Any] = field(default_factory=dict)
    matrix: Any = None
    coupling: Any = None
    target: Any = None
    direct: Any = None
    minimum: Any = None
    adjoint: Any = None
    grad: Any = None
    value: Any = None

    @property
    def at(self) -> tuple[Any, Any, Any]:
        """Return the problem, params and hparams: the first arguments of `bl.hypergradient` and its kin."""
        return self.problem, self.params, self.hparams

    def hypergradient(self, solver: Any = "cg", **options: Any) -> bl.Hypergradient:
        """Return the hypergradient at the point."""
        return bl.hypergradient(*self.at, solver=solver, **{**self.args, **options})


def mover(backend: Any, dtype: Any) -> Any:
    """Return a function that moves arrays to a framework."""
    backend = backend or framework("numpy")
    return lambda *arrays: tuple(backend.from_numpy(np.asarray(a, dtype)) for a in arrays)


def quadratic(
    backend: Any = None,
    eigenvalues: Any = (1.0, 1.6, 2.2, 2.8, 3.4, 4.0),
    hypers: int = 4,
    *,
    seed: int = 0,
    away: float = 0.0,
    direct: bool = True,
    offset: bool = True,
    as_data: bool = False,
    dtype: Any = np.float64,
) -> Case:
    """L = ½wᵀHw − wᵀ(Bλ + c), F = ½‖w − t‖² + dᵀλ.

    Args:
        backend: of the framework; None: NumPy's.
        eigenvalues: of H.
        hypers: how many hyperparameters.
        seed: draws all else.
        away: the distance of params from the minimum, relative to its norm.
        direct: whether F depends on λ, that is, whether d is not zero.
        offset: whether c is not zero.
        as_data: hand over H, B, c, t and d as data; then JAX compiles once for all of a size.
        dtype: of the arrays.
    """
    n, rng, move = len(eigenvalues), np.random.default_rng(seed), mover(backend, dtype)
    H = symmetric(eigenvalues, seed)
    B, t, c, d = (rng.standard_normal(shape) for shape in ((n, hypers), n, n, hypers))
    lam, step = rng.standard_normal(hypers), rng.standard_normal(n)
    c, d = c * offset, d * direct
    minimum = np.linalg.solve(H, B @ lam + c)
    w = minimum + away * np.linalg.norm(minimum) * step / np.linalg.norm(step)
    adjoint = np.linalg.solve(H, w - t)
    if as_data:
        problem, args = QUADRATIC, {"inner_args": move(H, B, c), "outer_args": move(t, d)}
    else:
        parts = zip(("hessian", "coupling", "target", "offset"), move(H, B, t, c), strict=True)
        problem, args = bl.problems.quadratic(**dict(parts), direct=move(d)[0] if direct else 0.0), {}
    value = 0.5 * np.sum((w - t) ** 2) + d @ lam
    return Case(problem, *move(w, lam), args, H, B, t, d, minimum, adjoint, d + B.T @ adjoint, value)


def diagonal(
    eigenvalues: Any, backend: Any = None, *, hparams: float = 0.0, dtype: Any = np.float64, **parts: Any
) -> tuple[Any, Any, Any]:
    """Return a problem, params and hparams: a quadratic with H diagonal, B = I, t = 1 and w = 0, but for ``parts``."""
    n, move = len(eigenvalues), mover(backend, dtype)
    parts = {"hessian": np.diag(eigenvalues), "coupling": np.eye(n), "target": np.ones(n), **parts}
    problem = bl.problems.quadratic(**dict(zip(parts, move(*parts.values()), strict=True)))
    return problem, *move(np.zeros(n), np.full(n, hparams))


class HalfSquare:
    """F = ½‖w‖²."""

    def __call__(self, w, h):
        return 0.5 * (w @ w)

    def grad(self, w, h):
        return w, None


class SquaredDistance:
    """F = ½‖w − t‖² + dᵀλ."""

    def __call__(self, w, h, t, d):
        return 0.5 * ((w - t) @ (w - t)) + d @ h

    def grad(self, w, h, t, d):
        return w - t, d


class Affine:
    """Aw + Bλ + c."""

    def __call__(self, w, h, A, B, c):
        return A @ w + B @ h + c

    def vjp_params(self, w, h, v, A, B, c):
        return A.T @ v

    def vjp_hparams(self, w, h, v, A, B, c):
        return B.T @ v

    def jvp_params(self, w, h, v, A, B, c):
        return A @ v


KINDS = {"fixed point": bl.FixedPoint, "root": bl.Root}


def equation(
    kind: str,
    backend: Any = None,
    weights: int = 5,
    hypers: int = 3,
    *,
    seed: int = 0,
    away: float = 0.0,
    function: Any = None,
    dtype: Any = np.float64,
) -> Case:
    """w = Aw + Bλ + c ("fixed point"), or 0 = Aw + Bλ + c ("root"), with F = ½‖w − t‖² + dᵀλ.

    The steps of the fixed point contract: the eigenvalues of A are at most 0.6. ``function`` is `Affine` unless given.
    """
    rng, move = np.random.default_rng(seed), mover(backend, dtype)
    A = rng.standard_normal((weights, weights))
    A *= 0.6 / np.abs(np.linalg.eigvals(A)).max()
    A += 2 * np.eye(weights) * (kind == "root")
    jacobian, sign = (A, 1.0) if kind == "root" else (np.eye(weights) - A, -1.0)  # the sign of λ in the residual
    B, c, t, d = (rng.standard_normal(shape) for shape in ((weights, hypers), weights, weights, hypers))
    lam = rng.standard_normal(hypers)
    solution = np.linalg.solve(jacobian, -sign * (B @ lam + c))
    w = solution * (1 + away)
    adjoint = np.linalg.solve(jacobian.T, w - t)
    args = {"inner_args": move(A, B, c), "outer_args": move(t, d)}
    problem = KINDS[kind](function or Affine(), SquaredDistance())
    value = 0.5 * np.sum((w - t) ** 2) + d @ lam
    return Case(problem, *move(w, lam), args, jacobian, B, t, d, solution, adjoint, d - sign * B.T @ adjoint, value)


def ridge(backend: Any = None, samples: int = 9, features: int = 4, *, seed: int = 0, dtype: Any = np.float64) -> Case:
    """Ridge regression with a penalty per feature, at its minimum."""
    rng, move = np.random.default_rng(seed), mover(backend, dtype)
    X, X_val, lam = *rng.standard_normal((2, samples, features)), rng.uniform(-2, 0, features)
    y, y_val = rng.standard_normal((2, samples))
    hessian = X.T @ X / samples + np.diag(np.exp(lam))
    w = np.linalg.solve(hessian, X.T @ y / samples)
    adjoint = np.linalg.solve(hessian, X_val.T @ (X_val @ w - y_val) / samples)
    args = {"inner_args": move(X, y), "outer_args": move(X_val, y_val)}
    grad, value = -np.exp(lam) * w * adjoint, 0.5 * np.mean((X_val @ w - y_val) ** 2)
    return Case(bl.problems.ridge(), *move(w, lam), args, hessian, minimum=w, adjoint=adjoint, grad=grad, value=value)
