"""Dense systems with known spectra, by recipe: the classes of matrices that a solver may promise to solve."""

from typing import NamedTuple

import numpy as np

SIZE = 6  # one for nearly all, since JAX compiles for each


class System(NamedTuple):
    """A x = b, in float64.

    Attributes:
        what: in words.
        matrix: A, of shape (n, n).
        rhs: b, of shape (n,).
        condition: the largest over the smallest singular value that is not zero.
    """

    what: str
    matrix: np.ndarray
    rhs: np.ndarray
    condition: float


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw standard normal entries, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape)


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q = np.linalg.qr(normal(seed, eigenvalues.size, eigenvalues.size))[0]
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def definite() -> System:
    """Return a well-conditioned positive definite system."""
    matrix = symmetric(np.linspace(1.0, 4.0, SIZE))
    return System("a positive definite system (eigenvalues from 1 to 4)", matrix, normal(1, SIZE), 4.0)


def clustered() -> System:
    """Return a system of which a few steps solve all but rounding, so that a solve stops early."""
    matrix = symmetric(np.linspace(2.0, 2.01, SIZE))
    return System("a positive definite system (eigenvalues from 2 to 2.01)", matrix, normal(1, SIZE), 1.005)


def ill_conditioned() -> System:
    """Return a positive definite system with a condition number of 1e4."""
    matrix = symmetric(np.geomspace(4e-4, 4.0, SIZE))
    return System("a positive definite system (eigenvalues from 4e-4 to 4)", matrix, normal(1, SIZE), 1e4)


def indefinite() -> System:
    """Return a system with eigenvalues of either sign."""
    matrix = symmetric(np.array([-2.0, -1.0, 1.0, 2.0, 3.0, 4.0]))
    return System("an indefinite system (eigenvalues -2, -1, 1, 2, 3, 4)", matrix, normal(1, SIZE), 4.0)


def singular() -> System:
    """Return a singular system that has solutions."""
    matrix = symmetric(np.array([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]))
    rhs = matrix @ normal(1, SIZE)
    return System("a singular system with solutions (eigenvalues 0, 0, 1, 2, 3, 4)", matrix, rhs, 4.0)


def nonsymmetric() -> System:
    """Return a system whose symmetric part is positive definite, but which is not symmetric."""
    skew = normal(2, SIZE, SIZE)
    matrix = definite().matrix + (skew - skew.T) / 4
    what = "a system that is not symmetric (its symmetric part has eigenvalues from 1 to 4)"
    return System(what, matrix, normal(1, SIZE), float(np.linalg.cond(matrix)))


CLASSES = {
    "definite": definite,
    "ill_conditioned": ill_conditioned,
    "indefinite": indefinite,
    "singular": singular,
    "nonsymmetric": nonsymmetric,
}


def inconsistent() -> System:
    """Return a singular system without a solution."""
    return System("a singular system without a solution", singular().matrix, normal(1, SIZE), 4.0)


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
    """Return a system that takes many steps, in which residuals by recurrence drift from the truth."""
    matrix = symmetric(np.geomspace(4e-4, 4.0, 100))
    return System("100 unknowns (eigenvalues from 4e-4 to 4)", matrix, normal(1, 100), 1e4)
