"""Scikit-learn's digits, split into three parts."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

TRAIN, VALIDATION = 300, 700  # few training images, so that regularization matters; 797 are left to test


class Part(NamedTuple):
    """Images of shape (n, pixels), with grey values from 0 to 1, and their digits of shape (n,)."""

    X: Any
    y: Any


class Digits(NamedTuple):
    """Images to fit parameters, to tune hyperparameters, and to test both."""

    train: Part
    validation: Part
    test: Part


def check_installed() -> None:
    """Raise an ImportError, with a command for installation, if a package that the demo needs is missing."""
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("tqdm", "tqdm")):
        if find_spec(module) is None:
            raise ImportError(f'The demo needs {package}, which is not installed: pip install "bilevel[demo]".')


def load(seed: int) -> Digits:
    """Return the digits in a random order."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    cuts = [TRAIN, TRAIN + VALIDATION]
    return Digits(*map(Part, np.split(X[order] / 16, cuts), np.split(y[order], cuts)))


def halve(digits: Digits) -> Digits:
    """Return the images at half the resolution: each block of 2x2 pixels becomes its mean."""
    return Digits(*(Part(part.X.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16), part.y) for part in digits))
