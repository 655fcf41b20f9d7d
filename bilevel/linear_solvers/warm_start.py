"""A solver that remembers: for eager loops, and for the checkpoints of their users."""

from collections.abc import Mapping
from typing import Any

from bilevel.config import get_solver
from bilevel.linear_solvers.prepared import prepared
from bilevel.options import check_int, is_python_value
from bilevel.protocols import HypergradientMethod, Operator, Tree, VectorSpace
from bilevel.results import SolverInfo, Status
from bilevel.spaces.tree import leaves_with_paths

FORMAT = 1


class WarmStart:
    """A linear solver that starts each solve from the solution of the last one, and keeps what it has prepared.

    Give the same object as ``solver=`` to every call of a loop. It has state: save it in your checkpoint beside that of
    the optimizers, or a resumed run will not continue as the other would have.

    For NumPy and PyTorch. In JAX, state is an argument: pass ``adjoint0=hg.adjoint`` and a solver from `bl.prepare`.

    Args:
        solver: a linear solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object. A run
            that resumes with another one keeps the adjoint, and prepares anew.
        extrapolate: start from 2·(last adjoint) − (the one before), as `bl.extrapolate` does, for outer steps that are
            small and regular.
        prepare_every: find the step size, sketch or preconditioner anew in every so many calls, and use it in the calls
            between, as `bl.prepare` does; None: leave it to the solver, at each call.

    Raises:
        TypeError, ValueError: for options that do not fit, or a method that is no linear solver (``unrolled``).

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> solver = bl.WarmStart("cg")
    >>> [bl.hypergradient(problem, np.zeros(2), np.zeros(2), solver=solver).info.steps for _ in range(2)]
    [2, 0]
    """

    def __init__(self, solver: Any = "cg", *, extrapolate: bool = False, prepare_every: int | None = None) -> None:
        self.solver = get_solver(solver)
        if isinstance(self.solver, HypergradientMethod):
            raise TypeError(
                f"WarmStart: {type(self.solver).__name__} solves no linear system that could be warm-started."
            )
        self.extrapolate = extrapolate
        self.prepare_every = prepare_every
        if prepare_every is not None:
            check_int(self, "prepare_every", least=1)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as for params of another shape."""
        self.calls = 0
        self.adjoint: Tree | None = None
        self.previous: Tree | None = None
        self.options: dict[str, Any] = {}
        self.loaded = False

    def __getattr__(self, name: str) -> Any:
        """Answer for the solver in it: what operators it takes, what options a failure should name."""
        # The solver is not there yet while this is copied or unpickled; to prepare is this object's own business.
        if name in ("solver", "prepare"):
            raise AttributeError(name)
        return getattr(self.solver, name)

    def __repr__(self) -> str:
        return f"WarmStart({self.solver!r}, extrapolate={self.extrapolate}, prepare_every={self.prepare_every})"

    def solve(self, operator: Operator, rhs: Tree, x0: Tree | None, space: VectorSpace) -> tuple[Tree, SolverInfo]:
        last, previous = self.adjoint, self.previous
        if last is not None and _shapes(last) != _shapes(rhs):
            raise ValueError(
                "WarmStart: remembers an adjoint of another structure than that of params, or of other shapes. Use a "
                "WarmStart of its own for each problem, or call reset()."
            )
        if self.loaded:  # from a file, most often to the CPU
            last, previous = (None if v is None else _brought(v, rhs, space) for v in (last, previous))
            if self.options:  # what is prepared for any operator has the same classes, dtypes and devices
                like = self.solver.prepare(lambda v: v, rhs, space)  # pyright: ignore[reportAttributeAccessIssue]
                self.options = _restored(self.options, like, space)
            self.loaded = False
        if x0 is None and last is not None:
            both = self.extrapolate and previous is not None
            x0 = space.axpy(-1.0, previous, space.scale(2.0, last)) if both else last
        solver: Any = self.solver
        if self.prepare_every is not None and hasattr(solver, "prepare"):
            if self.calls % self.prepare_every == 0:
                self.options = solver.prepare(operator, rhs, space)
            solver = prepared(solver, self.options)
        adjoint, info = solver.solve(operator, rhs, x0, space)
        # A solve that failed altogether leaves the memory as it was. So does one that an indefinite Hessian has led
        # astray: the next would set out from there, and the one after from further away.
        status, worse = info.status, info.residual_norm > info.rhs_norm
        lost = (status == int(Status.NON_FINITE)) | ((status != int(Status.MAXITER)) & worse)
        kept = space.zeros_like(rhs) if last is None else last
        self.calls += 1
        self.adjoint = space.select(lost, kept, adjoint)
        if self.extrapolate:
            self.previous = last
        return adjoint, info

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in arrays, numbers, dicts and lists: `torch.load` takes it with ``weights_only``."""
        return {
            "format": FORMAT,
            "solver": repr(self.solver),
            "calls": self.calls,
            "adjoint": self.adjoint,
            "previous": self.previous,
            "options": self.options if self.loaded else _plain(self.options),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` has returned; the next solve brings it to the device of params.

        Raises:
            ValueError: if a key is missing or unknown, or the format is another.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(
                f"WarmStart.load_state_dict: expected the keys {sorted(expected)}, got {sorted(state)}: this is no "
                "state of a WarmStart, or one of another version."
            )
        if state["format"] != FORMAT:
            raise ValueError(f"WarmStart.load_state_dict: expected format {FORMAT}, got {state['format']!r}.")
        self.calls = state["calls"]
        self.adjoint, self.previous = state["adjoint"], state["previous"]
        # An adjoint serves any solver, what was prepared for one no other.
        self.options = state["options"] if state["solver"] == repr(self.solver) else {}
        self.loaded = True


def _shapes(x: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(x)}


def _plain(options: Any) -> Any:
    """Return prepared options with dicts in the place of named tuples, whose classes a loader of weights refuses."""
    options = options._asdict() if hasattr(options, "_asdict") else options
    return {name: _plain(value) for name, value in options.items()} if isinstance(options, dict) else options


def _restored(stored: Any, like: Any, space: VectorSpace) -> Any:
    """Undo `_plain`, in the dtypes and on the device of options like these."""
    if hasattr(like, "_asdict"):
        return type(like)(**_restored(stored, like._asdict(), space))
    if isinstance(like, dict):
        return {name: _restored(stored[name], part, space) for name, part in like.items()}
    return stored if is_python_value(like) else _brought(stored, like, space)


def _brought(x: Tree, like: Tree, space: VectorSpace) -> Tree:
    """Return arrays in the dtype and on the device of others."""
    return space.unravel(space.ravel(x), like)
