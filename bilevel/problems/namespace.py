"""The array namespace of an array, without importing its framework."""

import sys
from typing import Any


def namespace(array: Any) -> Any:
    """Return numpy, torch or jax.numpy, by the array's type (the array API standard's way, and torch's)."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules["torch"]
