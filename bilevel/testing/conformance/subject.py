"""A solver under test: what it promises, and how it is run on a dense system."""

import dataclasses
from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from bilevel.config import solver_options
from bilevel.protocols import Backend, NonSymmetric, Operator, Point, Stochastic, Tree
from bilevel.results import SolverInfo, Status
from bilevel.spaces.ravel import to_host
from bilevel.testing.conformance.checks import require
from bilevel.testing.conformance.systems import System


class Answer(NamedTuple):
    """What a solver returned, on the host."""

    x: np.ndarray  # float64, of shape (n,)
    info: SolverInfo
    leaves: list[tuple[str, tuple[int, ...], str]]  # path, shape and dtype

    def __str__(self) -> str:
        steps, residual_norm, rhs_norm, status = self.info
        return (
            f"{status.name} after {steps} steps, residual_norm {residual_norm:.3g} of {rhs_norm:.3g}, "
            f"v = {np.array2string(self.x, precision=4, threshold=8)}"
        )


def run(backend: Backend, solver: Any, problem: None, point: Point) -> Any:
    """Call the solver on the operator that a point's arrays make up; what `Backend.execute` runs."""
    return solver.solve(product_of(backend, point), point.hparams, point.adjoint0, backend.space)


def run_nonsymmetric(backend: Backend, solver: Any, problem: None, point: Point) -> Any:
    """Call the solver on an operator that is said not to be symmetric."""
    return solver.solve(NonSymmetric(product_of(backend, point)), point.hparams, point.adjoint0, backend.space)


def run_stochastic(backend: Backend, solver: Any, problem: None, point: Point) -> Any:
    """Call the solver on an operator whose samples are all the same."""
    product = product_of(backend, point)
    return solver.solve(Stochastic(product, lambda i: product), point.hparams, point.adjoint0, backend.space)


def product_of(backend: Backend, point: Point) -> Operator:
    """Return v -> A v, and nan where v has a part along the unit vector of the point."""
    (matrix, unit), like, space = point.params, point.hparams, backend.space

    def product(v: Tree) -> Tree:
        flat = space.ravel(v)
        trapped = space.xp.where(space.dot(unit, flat) != 0, float("nan"), 1.0)
        return space.scale(trapped, space.unravel(matrix @ flat, like))

    return product


@dataclasses.dataclass(frozen=True)
class Subject:
    """A solver on a backend, with the promises that `check_solver` explains."""

    solver: Any
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
        """Return what the solver adds to the operator."""
        return float(getattr(self.solver, "damping", 0.0))

    def tolerance(self) -> float:
        """Return what is promised of norm(b - A v) / norm(b), with room for rounding."""
        eps = self.backend.space.eps(self.array(np.zeros(1)))
        rtol = (getattr(self.solver, "rtol", 0.0) or eps**0.5) if self.rtol is None else self.rtol
        return 10 * max(float(rtol), eps)

    def promises(self, kind: str, condition: float = 1.0) -> bool:
        """Tell whether systems of a class must be solved, as far as the dtype allows."""
        eps = self.backend.space.eps(self.array(np.zeros(1)))
        return kind in self.solves and eps * condition**2 <= self.tolerance() / 10

    def has_option(self, name: str) -> bool:
        """Tell whether the solver is a dataclass with this option."""
        return name in solver_options(type(self.solver))

    def with_dtype(self, dtype: str) -> "Subject":
        """Return the subject in another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def with_options(self, **options: Any) -> "Subject":
        """Return the subject with other options of the solver."""
        return dataclasses.replace(self, solver=dataclasses.replace(self.solver, **options))

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """Return an array of the framework."""
        return make_array(self.backend, values, dtype or self.dtype)

    def rounded(self, system: System) -> tuple[np.ndarray, np.ndarray]:
        """Return A and b as the solver sees them, rounded to the dtype, in float64; A with the damping."""
        shift = self.damping * np.eye(system.rhs.size)
        matrix, rhs = (to_host(self.backend, self.array(a)) for a in (system.matrix - shift, system.rhs))
        return matrix.reshape(shift.shape) + shift, rhs

    def solve(
        self,
        system: System,
        x0: Any = None,
        *,
        trap: int | None = None,
        shape: Callable[[Any], Tree] = lambda flat: flat,
        space: Any = None,
        runner: Callable[..., Any] = run,
    ) -> Answer:
        """Run the solver on a dense system, compiled where the framework compiles.

        Args:
            system: A x = b; the operator is A - damping · I, so that the damped one has the spectrum of A.
            x0: a warm start, of shape (n,).
            trap: products with a vector whose entry ``trap`` is not zero are nan.
            shape: from an array of shape (n,) to the tree that the solver gets.
            space: instead of the backend's.
            runner: `run`, or for another kind of operator.
        """
        n = system.rhs.size
        unit = np.zeros(n) if trap is None else np.eye(n)[trap]
        arrays = [self.array(a) for a in (system.matrix - self.damping * np.eye(n), unit)]
        rhs = shape(self.array(system.rhs))
        start = None if x0 is None else shape(self.array(x0))
        backend = self.backend if space is None else with_space(self.backend, space)
        with np.errstate(all="ignore"):  # NumPy would warn of the nan that some laws put in
            x, info = backend.execute(runner, self.solver, None, Point(arrays, rhs, adjoint0=start))  # pyright: ignore
        return self.answer(x, info)

    def answer(self, x: Any, info: Any) -> Answer:
        """Bring a result to the host."""
        numbers = (x if isinstance(x, int | float) else self.backend.to_host(x) for x in info)
        steps, residual_norm, rhs_norm, status = numbers
        where = str(self)
        require(float(steps).is_integer() and steps >= 0, where, "info.steps to count", steps)
        require(status in list(Status), where, "info.status to be a bl.Status", status)
        info = SolverInfo(int(steps), float(residual_norm), float(rhs_norm), Status(int(status)))
        leaves = [(path, tuple(leaf.shape), dtype_of(leaf)) for path, leaf in self.backend.leaves(x)]
        return Answer(to_host(self.backend, x), info, leaves)


def nest(flat: Any) -> Tree:
    """Give an array of shape (6,) a nested structure, in the order of its entries, with empty and scalar leaves."""
    return {"b": [flat[2:5].reshape(3, 1), (flat[5],)], "none": flat[:0], "a": flat[:2]}


def make_array(backend: Backend, values: Any, dtype: str) -> Any:
    """Return an array of the framework, of a dtype that NumPy may not have."""
    if dtype in ("float64", "float32"):
        return backend.from_numpy(np.asarray(values, dtype))
    xp = backend.space.xp
    return xp.asarray(backend.from_numpy(np.asarray(values, np.float32)), dtype=getattr(xp, dtype))


def widest(backend: Backend) -> str:
    """Return "float64", or "float32" where the framework has no other (JAX without x64)."""
    return dtype_of(backend.from_numpy(np.zeros(1)))


def dtype_of(leaf: Any) -> str:
    """Return the name of an array's dtype, without the framework's."""
    return str(leaf.dtype).rpartition(".")[2]


def with_space(backend: Backend, space: Any) -> Backend:
    """Return a copy of a backend with another vector space."""
    other = copy(backend)
    other.space = space
    return other
