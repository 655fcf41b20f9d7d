"""A backend under test, with methods that run its functions and convert results to NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem
from bilevel.testing.conformance.checks import require
from bilevel.testing.conformance.subject import dtype_of, make_array, nest
from bilevel.testing.conformance.systems import SIZE, normal


@dataclass(frozen=True)
class Framework:
    """A backend with a dtype, and perhaps a problem at a point."""

    backend: Backend
    dtype: str
    problem: BilevelProblem | None = None
    inputs: Inputs[Any, Any] | None = None

    def __str__(self) -> str:
        return f"{type(self.backend).__name__} ({self.backend.name}), {self.dtype}"

    @property
    def eps(self) -> float:
        """Return the machine epsilon of the dtype."""
        return float(np.finfo(self.dtype).eps)

    def array(self, values: np.ndarray | float | list[float], dtype: str | None = None) -> Any:
        """Return an array of the framework."""
        return make_array(self.backend, values, dtype or self.dtype)

    def tree(self, flat: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
        """Return an array of shape (6,) as the tree that the laws use."""
        return nest(self.array(flat, dtype))

    def draw(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a vector, rounded to the dtype. Return it as a float64 NumPy array and as a tree."""
        flat = normal(seed, SIZE).astype(self.dtype)
        return flat.astype(np.float64), self.tree(flat)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call function(space, *args) with the space of the first argument, compiled if the framework compiles."""
        return self.backend.run(_call, function, args)

    def flat(self, tree: object) -> np.ndarray:
        """Return the entries of a tree in float64, of shape (n,), leaf by leaf."""
        leaves = [self.host(leaf).ravel() for _, leaf in self.backend.leaves(tree)]
        return np.concatenate([np.zeros(0), *leaves])

    def host(self, array: Any) -> np.ndarray:
        """Return an array in float64."""
        return np.asarray(self.backend.to_numpy(array), np.float64)

    def shapes(self, tree: object) -> list[tuple[str, tuple[int, ...], str]]:
        """Return path, shape and dtype of each leaf."""
        return [(path, tuple(leaf.shape), dtype_of(leaf)) for path, leaf in self.backend.leaves(tree)]

    def close(self, what: str, got: object, expected: object, factor: float = 100.0) -> None:
        """Raise an AssertionError unless arrays agree to a relative ``factor`` times the machine epsilon."""
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        right = got.shape == expected.shape
        if right:
            size = float(np.linalg.norm(expected)) or 1.0
            right = bool(np.linalg.norm(got - expected) <= factor * self.eps * size)
        self.require(right, what, expected, got)

    def equal(self, what: str, got: object, expected: object) -> None:
        """Raise an AssertionError unless two values are equal."""
        equal = np.array_equal(np.asarray(got), expected) if isinstance(expected, np.ndarray) else got == expected
        self.require(equal, what, expected, got)

    def require(self, holds: object, what: str, expected: object, got: object) -> None:
        """Raise an AssertionError with the expected and the actual result, unless ``holds`` is true."""
        require(holds, str(self), f"{what} = {expected}", got)

    def keeps(self, what: str, got: object, like: object) -> None:
        """Raise an AssertionError unless a tree has the structure, shapes and dtypes of another."""
        self.equal(f"path, shape and dtype of {what}", self.shapes(got), self.shapes(like))


def _call(backend: Backend, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(backend.space(args[0]), *args)


def vector(f: Framework, tree: object) -> np.ndarray:
    """Return the entries of a tree by the space's own method."""
    return f.backend.to_flat(tree)
