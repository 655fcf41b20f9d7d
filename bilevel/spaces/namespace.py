"""The array namespace of an array, without importing its framework."""

import sys
from typing import Any


def namespace(array: Any) -> Any:
    """Return numpy, torch or jax.numpy by the type of an array. Torch does not follow the array API standard here."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules["torch"]
