"""The methods of the comparison: solvers of the library, and filters of the eigenvalues of the Hessian."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import bilevel as bl
from benchmarks.attribution.points import Spectral
from benchmarks.attribution.runs import MOMENTUM, Training

DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
PROBES = 30  # products that estimate the most negative eigenvalue
AUTO = "CG"  # with its automatic damping
UNDAMPED = "CG, damping 0"
LEAST = 1e-3  # damping over the largest eigenvalue, where no negative eigenvalue is found


class Answer(NamedTuple):
    """Hypergradients (objectives, examples), and the mean number of Hessian products of a solve."""

    method: str
    gradients: np.ndarray
    products: float


def lanczos(values: np.ndarray, start: np.ndarray, products: int = PROBES) -> tuple[np.ndarray, np.ndarray]:
    """Return the Ritz values and the share of the start in each Ritz vector, with full orthogonalization."""
    basis = np.zeros((products, len(start)))
    projected = np.zeros((products, products))
    q = start / np.linalg.norm(start)
    for k in range(products):
        basis[k] = q
        z = values * q
        for _ in range(2):
            overlap = basis[: k + 1] @ z
            projected[: k + 1, k] += overlap
            z = z - overlap @ basis[: k + 1]
        q = z / np.linalg.norm(z)
    ritz, vectors = np.linalg.eigh(projected, UPLO="U")
    return ritz, vectors[0] ** 2


def auto_damping(at: Spectral) -> float:
    """Return twice the most negative Ritz value of a Lanczos process that starts at ∂F/∂w."""
    ritz, _ = lanczos(at.values, at.rhs[0])
    return max(-2 * ritz[0], LEAST * ritz[-1])


def solve(at: Spectral, solver: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Return v and the hypergradient for each objective, and the mean number of products."""
    count = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return at.values * v

    adjoints, gradients = [], []
    for value, rhs in zip(at.outer_values, at.rhs, strict=True):
        linearization = bl.Linearization(float(value), rhs, None, product, lambda v: at.cross @ v)
        hg = bl.hypergradient_from(linearization, solver=solver, on_failure="ignore")
        adjoints.append(hg.adjoint)
        gradients.append(hg.grad)
    return np.array(adjoints), np.array(gradients), count / len(at.rhs)


def solved(
    hessian: Spectral, gauss_newton: Spectral, training: Training, dampings: Sequence[float] = DAMPINGS
) -> Iterator[Answer]:
    """Yield the answer of each solver."""

    def answer(label: str, at: Spectral, solver: Any) -> Answer:
        _, gradients, products = solve(at, solver)
        return Answer(label, gradients, products)

    yield answer("identity", hessian, bl.Identity())
    yield answer(AUTO, hessian, bl.CG())
    yield answer(UNDAMPED, hessian, bl.CG(damping=0.0))
    for each in dampings:
        yield answer(f"CG, damping {each:g}", hessian, bl.CG(damping=each))
    yield answer("Gauss-Newton CG", gauss_newton, bl.CG())
    for each in dampings:
        yield answer(f"Gauss-Newton CG, damping {each:g}", gauss_newton, bl.CG(damping=each))
    yield answer("Neumann, 20 terms", hessian, bl.Neumann())
    if training.optimizer == "momentum":
        as_trained = bl.Neumann(terms=training.steps - 1, step_size=training.time / training.steps)
        yield answer("Neumann, the training's step and steps", hessian, as_trained)
        yield answer("CG, damping 1/(step·steps)", hessian, bl.CG(damping=1 / training.time))
        yield answer("Gauss-Newton CG, damping 1/(step·steps)", gauss_newton, bl.CG(damping=1 / training.time))
    yield answer("Nyström", hessian, bl.Nystrom())
    yield answer("MINRES", hessian, bl.MINRES())


def filtered(at: Spectral, training: Training) -> Iterator[Answer]:
    """Yield the answers of filters of the eigenvalues of the Hessian, which no number of products gives exactly."""
    values = at.values

    def answer(label: str, factors: np.ndarray) -> Answer:
        return Answer(label, -(at.rhs * factors) @ at.cross.T, float("nan"))

    yield answer("filter 1/(μ + 2|μmin|)", 1 / (values + max(-2 * values[0], LEAST * values[-1])))
    if training.optimizer == "momentum":
        yield answer("filter of early stopping", early_stopping(values, training))
        yield answer("filter 1/(|μ| + 1/(step·steps))", 1 / (np.abs(values) + 1 / training.time))


def early_stopping(values: np.ndarray, training: Training) -> np.ndarray:
    """Return (1 − (1 − ημ)^T)/μ for each eigenvalue μ, with momentum: the factors of the run on a quadratic."""
    factors = velocity = np.zeros_like(values)
    for _ in range(training.steps):
        velocity = MOMENTUM * velocity + values * factors - 1
        factors = factors - training.rate * velocity
    return factors
