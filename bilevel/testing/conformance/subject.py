"""A solver under test, with its promises and a method that runs it on a dense system."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.config import solver_options
from bilevel.linear_solvers import LinearSolver
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import Array, V
from bilevel.testing.conformance.checks import require
from bilevel.testing.conformance.systems import System


class Answer(NamedTuple):
    """The result of a solver, on the host."""

    x: np.ndarray  # float64, of shape (n,)
    info: SolverInfo
    leaves: list[tuple[str, tuple[int, ...], str]]  # path, shape and dtype

    def __str__(self) -> str:
        info = self.info
        return (
            f"{info.status.name} after {info.steps} steps, residual_norm {info.residual_norm:.3g} of "
            f"{info.rhs_norm:.3g}, "
            f"v = {np.array2string(self.x, precision=4, threshold=8)}"
        )


class Kind(NamedTuple):
    """Properties of the operator that the solver receives.

    Attributes:
        symmetric: whether the operator is symmetric.
        sampled: whether each step has a sample. All samples are equal.
    """

    symmetric: bool = True
    sampled: bool = False


def run(
    backend: Backend, solver: LinearSolver[Any], kind: Kind, arrays: tuple[Array, Array], rhs: V, x0: V | None
) -> tuple[V, SolverInfo]:
    """Call the solver on the operator v -> A v. The product is nan if v·unit is not zero."""
    (matrix, unit), space = arrays, backend.space(rhs)

    def product(v: V) -> V:
        flat = space.ravel(v)
        trapped = space.xp.where(backend.space(flat).dot(unit, flat) != 0, float("nan"), 1.0)
        return space.scale(trapped, space.unravel(matrix @ flat))

    def transpose(v: V) -> V:
        return space.unravel(matrix.T @ space.ravel(v))

    sample = (lambda i: product) if kind.sampled else None
    A = LinearOperator(space, product, kind.symmetric, sample, transpose=None if kind.symmetric else transpose)
    return solver.solve(solver.init(A), A, rhs, x0)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A solver on a backend, with the arguments of `check_solver`."""

    solver: Any  # a LinearSolver or a Method
    backend: Backend
    dtype: str  # float64, float32 or bfloat16
    solves: frozenset[str] = frozenset({"definite"})
    rtol: float | None = None
    truncated: bool = False
    warm_start: bool = True

    def __str__(self) -> str:
        return f"{self.solver!r}, {self.dtype}, {self.backend.name}"

    @property
    def damping(self) -> float:
        """Return the solver's damping; 0 if it is automatic."""
        return 0.0 if self.automatic else float(self.solver.damping)

    @property
    def automatic(self) -> bool:
        """Return whether the solver finds its damping."""
        return isinstance(self.solver.damping, str)

    @property
    def eps(self) -> float:
        """Return the machine epsilon of the dtype."""
        return self.backend.space(self.array(np.zeros(1))).eps

    def tolerance(self) -> float:
        """Return the promised bound of norm(b - A v) / norm(b), with a margin for rounding."""
        eps = self.eps
        rtol = (self.solver.rtol or eps**0.5) if self.rtol is None else self.rtol
        return 10 * max(float(rtol), eps)

    def promises(self, kind: str, condition: float = 1.0) -> bool:
        """Return whether systems of a class must be solved, given the precision of the dtype."""
        return kind in self.solves and self.eps * condition**2 <= self.tolerance() / 10

    def has_option(self, name: str) -> bool:
        """Return whether the solver is a dataclass with this option."""
        return name in solver_options(type(self.solver))

    def with_dtype(self, dtype: str) -> "Subject":
        """Return the subject in another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def with_options(self, **options: Any) -> "Subject":
        """Return the subject with other options of the solver."""
        return dataclasses.replace(self, solver=dataclasses.replace(self.solver, **options))

    def array(self, values: np.ndarray | float | list[float], dtype: str | None = None) -> Any:
        """Return an array of the framework."""
        return make_array(self.backend, values, dtype or self.dtype)

    def rounded(self, system: System) -> tuple[np.ndarray, np.ndarray]:
        """Return A (with the damping) and b, rounded to the dtype, in float64."""
        shift = self.damping * np.eye(system.rhs.size)
        matrix, rhs = (self.backend.to_flat(self.array(a)) for a in (system.matrix - shift, system.rhs))
        return matrix.reshape(shift.shape) + shift, rhs

    def solve(
        self,
        system: System,
        x0: np.ndarray | None = None,
        *,
        trap: int | None = None,
        shape: Callable[[Any], Any] = lambda flat: flat,
        backend: Backend | None = None,
        kind: Kind = Kind(),  # noqa: B008 (immutable)
    ) -> Answer:
        """Run the solver on a dense system, compiled if the framework compiles.

        Args:
            system: A x = b. The operator is A - damping · I, so the damped operator has the spectrum of A.
            x0: a warm start, of shape (n,).
            trap: an index: products with a vector whose entry ``trap`` is not zero are nan.
            shape: a function from an array of shape (n,) to the tree that the solver receives.
            backend: a variant of the backend; None: the backend itself.
            kind: properties of the operator.
        """
        n = system.rhs.size
        unit = np.zeros(n) if trap is None else np.eye(n)[trap]
        arrays = (self.array(system.matrix - self.damping * np.eye(n)), self.array(unit))
        start = None if x0 is None else shape(self.array(x0))
        backend = self.backend if backend is None else backend
        with np.errstate(all="ignore"):  # some laws pass nan
            x, info = backend.run(run, self.solver, kind, arrays, shape(self.array(system.rhs)), start)
        return self.answer(x, info)

    def answer(self, x: object, info: Any) -> Answer:
        """Convert a result to NumPy."""
        numbers = (x if isinstance(x, int | float) else self.backend.to_host(x) for x in info)
        steps, residual_norm, rhs_norm, status, _, _, damping, _ = numbers
        where = str(self)
        require(float(steps).is_integer() and steps >= 0, where, "info.steps to count", steps)
        require(status in list(Status), where, "info.status to be a bl.Status", status)
        numbers = int(steps), float(residual_norm), float(rhs_norm), Status(int(status))
        info = SolverInfo(*numbers, damping=float(damping))
        leaves = [(path, tuple(leaf.shape), dtype_of(leaf)) for path, leaf in self.backend.leaves(x)]
        return Answer(self.backend.to_flat(x), info, leaves)


def nest(flat: Any) -> dict[str, Any]:
    """Return the entries of an array of shape (6,), in order, as a tree with empty and scalar leaves."""
    return {"b": [flat[2:5].reshape(3, 1), (flat[5],)], "none": flat[:0], "a": flat[:2]}


def make_array(backend: Backend, values: np.ndarray | float | list[float], dtype: str) -> Any:
    """Return an array of the framework. NumPy need not have the dtype."""
    if dtype in ("float64", "float32"):
        return backend.from_numpy(np.asarray(values, dtype))
    single = backend.from_numpy(np.asarray(values, np.float32))
    xp = backend.space(single).leaf_xp
    return xp.asarray(single, dtype=getattr(xp, dtype))


def widest(backend: Backend) -> str:
    """Return "float64", or "float32" if the framework has no float64 (JAX without x64)."""
    return dtype_of(backend.from_numpy(np.zeros(1)))


def dtype_of(leaf: Any) -> str:
    """Return the name of an array's dtype, without the framework's name."""
    return str(leaf.dtype).rpartition(".")[2]
