"""Dense systems with known spectra, and the classes of systems that a solver can promise to solve."""

from typing import NamedTuple

import numpy as np

SIZE = 6  # the same for nearly all systems, because JAX compiles for each size
MANY = 40  # enough for rounding errors to accumulate


class System(NamedTuple):
    """A x = b, in float64.

    Attributes:
        what: a description.
        matrix: A, of shape (n, n).
        rhs: b, of shape (n,).
        condition: the ratio of the largest to the smallest nonzero singular value.
    """

    what: str
    matrix: np.ndarray
    rhs: np.ndarray
    condition: float


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw standard normal entries, equal for equal seeds."""
    return np.random.default_rng(seed).standard_normal(shape)


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q = np.linalg.qr(normal(seed, eigenvalues.size, eigenvalues.size))[0]
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def definite(size: int = SIZE) -> System:
    """Return a well-conditioned positive definite system."""
    matrix = symmetric(np.linspace(1.0, 4.0, size))
    return System("a positive definite system (eigenvalues from 1 to 4)", matrix, normal(1, size), 4.0)


def clustered() -> System:
    """Return a system that a few steps solve to rounding, so that a solve stops early."""
    matrix = symmetric(np.linspace(2.0, 2.01, SIZE))
    return System("a positive definite system (eigenvalues from 2 to 2.01)", matrix, normal(1, SIZE), 1.005)


def ill_conditioned(size: int = SIZE) -> System:
    """Return a positive definite system with a condition number of 1e4."""
    matrix = symmetric(np.geomspace(4e-4, 4.0, size))
    return System("a positive definite system (eigenvalues from 4e-4 to 4)", matrix, normal(1, size), 1e4)


def indefinite(size: int = SIZE) -> System:
    """Return a system with positive and negative eigenvalues, a third of them negative."""
    matrix = symmetric(np.concatenate([np.linspace(-2.0, -1.0, size // 3), np.linspace(1.0, 4.0, size - size // 3)]))
    return System("an indefinite system (eigenvalues from -2 to -1 and from 1 to 4)", matrix, normal(1, size), 4.0)


def singular(size: int = SIZE, seed: int = 0) -> System:
    """Return a singular system that has solutions."""
    matrix = symmetric(np.concatenate([np.zeros(size // 3), np.linspace(1.0, 4.0, size - size // 3)]), seed)
    what = "a singular system with solutions (a third of the eigenvalues 0, the others from 1 to 4)"
    return System(what, matrix, matrix @ normal(1, size), 4.0)


def nonsymmetric(size: int = SIZE) -> System:
    """Return a nonsymmetric system whose symmetric part is positive definite."""
    skew = normal(2, size, size) * np.sqrt(SIZE / size) / 4
    matrix = definite(size).matrix + skew - skew.T
    what = "a system that is not symmetric (its symmetric part has eigenvalues from 1 to 4)"
    return System(what, matrix, normal(1, size), float(np.linalg.cond(matrix)))


CLASSES = {
    "definite": definite,
    "ill_conditioned": ill_conditioned,
    "indefinite": indefinite,
    "singular": singular,
    "nonsymmetric": nonsymmetric,
}


def inconsistent(size: int = SIZE, seed: int = 0) -> System:
    """Return a singular system without a solution."""
    what = "a singular system without a solution"
    return System(what, singular(size, seed).matrix, normal(1 + seed, size), 4.0)


def nearly_singular(seed: int) -> System:
    """Return a nonsymmetric system with a condition number of 1e6, too large for float32."""
    left, _, right = np.linalg.svd(normal(seed, SIZE, SIZE))
    matrix = (left * np.geomspace(4.0, 4e-6, SIZE)) @ right
    what = f"a system that is not symmetric (singular values from 4e-6 to 4, draw {seed})"
    return System(what, matrix, normal(1000 + seed, SIZE), 1e6)


def multiple(factor: float) -> System:
    """Return factor · I x = b."""
    return System(f"{factor:g} times the identity", factor * np.eye(SIZE), normal(1, SIZE), 1.0)


def one_unknown(factor: float) -> System:
    """Return a system of one equation."""
    return System(f"{factor:g} x = 2", np.array([[factor]]), np.array([2.0]), 1.0)


def chain() -> System:
    """Return a system whose Krylov space reaches the unknown k with the k-th product, counted from 0."""
    matrix = 2.5 * np.eye(SIZE) - 0.7 * (np.eye(SIZE, k=1) + np.eye(SIZE, k=-1))
    return System("a tridiagonal positive definite system", matrix, np.eye(SIZE)[0], 3.5)


def long() -> System:
    """Return a system that takes many steps, in which residuals by recurrence lose accuracy."""
    matrix = symmetric(np.geomspace(4e-4, 4.0, 100))
    return System("100 unknowns (eigenvalues from 4e-4 to 4)", matrix, normal(1, 100), 1e4)
