"""The same systems and problems in every framework that is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bilevel as bl
from bilevel.linear_solvers.linear_solver import run_solver
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.tree import tree_map

FRAMEWORKS = ["numpy", "torch", "jax"]
DTYPES = [np.float32, np.float64]
EXAMPLES = Path(__file__).parents[2] / "examples"


def framework(name: str) -> Any:
    """Return a backend, or skip where its framework is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return bl.get_backend(name)


def installed() -> dict[str, Any]:
    """Return the backends whose frameworks are installed, by name."""
    return {name: bl.get_backend(name) for name in FRAMEWORKS if importlib.util.find_spec(name) is not None}


def namespace(backend: Any) -> Any:
    """Return the array namespace of a backend."""
    return backend.space(backend.from_numpy(np.ones(1))).leaf_xp


def moved(backend: Any, tree: Any) -> Any:
    """Return a tree of arrays of a framework, in float64."""
    return tree_map(lambda leaf: backend.from_numpy(np.asarray(leaf, np.float64)), tree)


def tolerance(dtype: Any, condition: float = 1.0, factor: float = 100.0) -> float:
    """Return the relative error that a backward stable computation stays below, in one place for all tests."""
    return factor * float(np.finfo(dtype).eps) * condition


def relative_error(x: Any, expected: Any) -> float:
    """Return norm(x - expected) / norm(expected)."""
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(x - expected) / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))


def symmetric(eigenvalues: Any, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((eigenvalues.size,) * 2))
    matrix = q @ np.diag(eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def solve(
    backend: Any, solver: Any, matrix: np.ndarray, rhs: np.ndarray, x0: Any = None, symmetric: bool = True
) -> tuple[np.ndarray, bl.SolverInfo]:
    """Run a linear solver on a dense system in a framework, compiled where it compiles; bring the answer back."""
    x0 = None if x0 is None else backend.from_numpy(x0)
    arrays = (backend.from_numpy(matrix), backend.from_numpy(rhs), x0)
    with np.errstate(all="ignore"):  # NumPy would warn of the nan that some tests put in
        x, info = backend.run(_solve, solver, *arrays, symmetric)
    numbers = bl.SolverInfo(*(backend.to_host(i) if hasattr(i, "dtype") else i for i in info))
    return backend.to_numpy(x), numbers._replace(steps=int(numbers.steps), status=bl.Status(int(numbers.status)))


def _solve(backend: Any, solver: Any, matrix: Any, rhs: Any, x0: Any, symmetric: bool) -> Any:
    A = LinearOperator(backend.space(rhs), lambda v: matrix @ v, symmetric, transpose=lambda v: matrix.T @ v)
    return run_solver(solver, A, rhs, x0)


def failures(checks: Any) -> dict[str, str]:
    """Return what the checks of a suite that fail say, by their names."""
    said = {}
    for check in checks:
        try:
            check()
        except AssertionError as error:
            said[check.name] = str(error)
    return said


def example(path: str) -> ModuleType:
    """Import one of the examples."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
