"""Scikit-learn's digits, split three ways."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

TRAIN, VALIDATION = 300, 700  # few to train on, so that regularization matters; 797 are left to test


class Part(NamedTuple):
    """Images of shape (n, pixels), grey from 0 to 1, and their digits of shape (n,)."""

    X: Any
    y: Any


class Digits(NamedTuple):
    """To fit parameters, to tune hyperparameters, and to judge both."""

    train: Part
    validation: Part
    test: Part


def check_installed() -> None:
    """Raise unless all is there that only the demo needs.

    Raises:
        ImportError: with the command that installs it.
    """
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise ImportError(f'The demo needs {package}, which is not installed: pip install "bilevel[demo]".')


def load(seed: int) -> Digits:
    """Return the digits in an order drawn with a seed."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    cuts = [TRAIN, TRAIN + VALIDATION]
    return Digits(*map(Part, np.split(X[order] / 16, cuts), np.split(y[order], cuts)))


def halve(digits: Digits) -> Digits:
    """Return the images at half the resolution: each 2x2 pixels replaced by their mean."""
    return Digits(*(Part(part.X.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16), part.y) for part in digits))
