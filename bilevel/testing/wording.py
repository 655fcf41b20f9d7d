"""Descriptions of the differences between hypergradients."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np

IMPLICIT = "The implicit term −(∂²L/∂λ∂w)ᵀ v"
WIDTH = 100
EXPLAINED = 0.02  # a relation holds if it leaves at most this fraction of the difference


def relation(
    tested: np.ndarray, expected: np.ndarray, direct: np.ndarray, noise: np.ndarray | float = 0.0
) -> str | None:
    """Return a sentence that describes a simple relation between two hypergradients, or None.

    Args:
        tested: entries of the tested hypergradient, or its products with directions; of shape (k,).
        expected: the same of the reference.
        direct: the same of ∂F/∂λ.
        noise: the noise of ``expected``.

    >>> relation(np.array([1.0, -2.0]), np.array([-1.0, 2.0]), np.zeros(2))
    'They differ by the sign.'
    >>> relation(np.array([1.0, -2.0]), np.array([0.5, -1.0]), np.zeros(2))
    'They differ by a factor of 2.00 (hypergradient / reference).'
    """
    if not (np.isfinite(tested).all() and np.isfinite(expected).all()):
        return None
    implicit = expected - direct
    c, k = _factor(tested, expected), _factor(tested - direct, implicit)
    candidates = {
        "The hypergradient is zero.": 0 * expected,
        "They differ by the sign.": -expected,
        "The direct term ∂F/∂λ is missing: the difference equals it.": implicit,
        "The direct term ∂F/∂λ is counted twice: the difference equals it.": expected + direct,
        "The direct term ∂F/∂λ has the wrong sign.": implicit - direct,
        f"{IMPLICIT} is missing: there is only ∂F/∂λ.": direct,
        f"{IMPLICIT} has the wrong sign; ∂F/∂λ is right.": direct - implicit,
        f"They differ by a factor of {c:.2f} (hypergradient / reference).": c * expected,
        f"{IMPLICIT} is off by a factor of {k:.2f}; ∂F/∂λ is right.": direct + k * implicit,
    }
    left = {sentence: np.linalg.norm(tested - candidate) for sentence, candidate in candidates.items()}
    noise_norm, least = np.linalg.norm(noise), min(left.values())
    difference = np.linalg.norm(tested - expected)
    if least > EXPLAINED * difference + noise_norm:
        return None
    # The first of the sentences that fit about as well as the best: simple relations come before fitted factors. A
    # sentence that leaves most of the difference explains nothing: it only says that a zero term is missing.
    enough = min(3 * (least + noise_norm) + 1e-6 * np.linalg.norm(expected), difference / 2)
    return next((sentence for sentence, gap in left.items() if gap <= enough), None)


def paragraphs(*parts: str) -> str:
    """Join texts and tables. Wrap the texts."""
    return "\n\n".join(part if "\n" in part else fill(part, WIDTH) for part in parts)


def table(titles: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """Return rows of text in columns, with a ">" before flagged rows."""
    columns = zip(titles, *(cells for _, cells in rows), strict=True)
    first, *others = (max(len(cell) for cell in column) for column in columns)

    def line(mark: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells[1:], others, strict=True))
        return "  ".join([f"{mark} {cells[0].ljust(first)}", *padded])

    return "\n".join([line(" ", titles), *(line(">" if bad else " ", cells) for bad, cells in rows)])


def _factor(a: np.ndarray, b: np.ndarray) -> float:
    """Return the c for which c·b is nearest to a."""
    return float(a @ b / (b @ b)) if b.any() else 0.0
