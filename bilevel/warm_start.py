"""A solver with a state, for eager loops and for checkpoints."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from typing_extensions import override

from bilevel.config import get_linear_solver
from bilevel.linear_solvers.auto_damping import next_damping, solve_with_auto_damping
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.linear_solvers.wrapper import LinearSolverWrapper
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import check_int, is_python_value
from bilevel.results import SolverInfo, Status
from bilevel.spaces import tree
from bilevel.spaces.array import V
from bilevel.spaces.space import Space

FORMAT = 4
VECTORS = ("adjoint", "previous", "image")


class WarmStart(LinearSolverWrapper[object]):
    """A linear solver that starts each solve from the last solution, and reuses its preliminary work.

    Pass the same object as ``solver=`` to every call of a loop. It has state. Save the state in your checkpoint
    together with the optimizers' states. Otherwise a resumed run differs from an uninterrupted one.

    With damping="auto", each solve first tries 0.95 of the last damping. So it needs no second solve if the Hessian
    changes little. If each call has another batch, the Hessian has noise. One more product measures the noise: the last
    adjoint times the present Hessian. Then the first damping is twice the noise, but at least 0.95 of the last damping
    and at most twice the last damping.

    For NumPy and PyTorch. In JAX, state is an argument: pass ``adjoint0=hg.adjoint`` and a solver from `bl.prepare`.

    Args:
        solver: a linear solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object. A run
            that resumes with another solver keeps the adjoint and repeats the preliminary work.
        extrapolate: start from 2·(last adjoint) − (adjoint before), as `bl.extrapolate` does. It helps if outer steps
            are small and regular.
        prepare_every: number of calls that share a step size, sketch or preconditioner, as with `bl.prepare`. None:
            compute it at each call.

    Attributes:
        counts: number of solves by the name of their status.

    Raises:
        TypeError, ValueError: if an option is invalid, or if the solver is a `WarmStart` or not linear (``unrolled``).

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> solver = bl.WarmStart("cg")
    >>> [bl.hypergradient(problem, np.zeros(2), np.zeros(2), solver=solver).info.steps for _ in range(2)]
    [2, 0]
    >>> solver.counts
    Counter({'CONVERGED': 2})
    """

    stateful: ClassVar[bool] = True

    def __init__(self, solver: object = "cg", *, extrapolate: bool = False, prepare_every: int | None = None) -> None:
        self.solver: LinearSolver[Any] = get_linear_solver(solver, "WarmStart")
        if self.solver.stateful:
            raise TypeError("WarmStart: the solver is a WarmStart. Use it directly, or make one of its solver.")
        self.extrapolate = extrapolate
        self.prepare_every = prepare_every
        if prepare_every is not None:
            check_int(self, "prepare_every", least=1)
        self.reset()

    def reset(self) -> None:
        """Delete the state, for example before using params of another shape."""
        self.calls = 0
        self.counts: Counter[str] = Counter()
        self.adjoint: object = None
        self.previous: object = None
        self.last_damping: Any = None  # the automatic damping δ of the last solve
        self.image: object = None  # b - δ · adjoint: the Hessian of the last solve times the adjoint, up to a residual
        self.residual_norm: Any = None  # of this residual
        self.state: object = None  # the state of the inner solver
        self.loaded: list[object] | None = None  # the leaves of a loaded state, until `_move`. None: nothing to move

    def __repr__(self) -> str:
        return f"WarmStart({self.solver!r}, extrapolate={self.extrapolate}, prepare_every={self.prepare_every})"

    @override
    def init(self, A: LinearOperator[V]) -> object:
        """Return the state of the inner solver, computed at each call, or once for ``prepare_every`` calls."""
        if self.loaded is not None:
            self._move(A)
        if self.prepare_every is None:
            return self.solver.init(A)
        if self.state is None or self.calls % self.prepare_every == 0:
            state = self.solver.init(A)
            self.state = tree.with_leaves(state, map(A.space.leaf, tree.leaves(state)))
        return self.state

    @override
    def solve(self, state: object, A: LinearOperator[V], b: V, x0: V | None) -> tuple[V, SolverInfo]:
        space, last = A.space, self._stored(self.adjoint, A.space)
        if x0 is None and last is not None:
            previous = self._stored(self.previous, space) if self.extrapolate else None
            x0 = last if previous is None else space.subtract(space.scale(2.0, last), previous)
        automatic = isinstance(self.solver.damping, str)
        if automatic:
            start = None if self.last_damping is None else self._next_damping(A)
            adjoint, info = solve_with_auto_damping(self.solver, state, A, b, x0, start)
        else:
            adjoint, info = self.solver.solve(state, A, b, x0)
        # Do not store the result of a failed solve that moved away from the solution, as with an indefinite Hessian.
        # Otherwise each solve would start further away than the last one.
        status, worse = info.status, info.residual_norm > info.rhs_norm
        lost = (status == int(Status.NON_FINITE)) | ((status != int(Status.MAXITER)) & worse)
        self.calls += 1

        def kept(new: V, old: V | None) -> V:
            return space.where(lost, space.zeros() if old is None else old, new)

        if automatic:
            image = space.axpy(-info.damping, adjoint, b)
            self.image = kept(image, self._stored(self.image, space))
            error = 0.0 if self.residual_norm is None else self.residual_norm
            self.residual_norm = space.leaf(space.xp.where(lost, error, info.residual_norm))
            self.last_damping = space.leaf(info.damping)
        self.adjoint = kept(adjoint, last)
        if self.extrapolate:
            self.previous = last
        return adjoint, info

    def _next_damping(self, A: LinearOperator[V]) -> Any:
        """Return the damping to try first. If the last solve needed no damping, none is tried, without a product."""
        v, image = self._stored(self.adjoint, A.space), self._stored(self.image, A.space)
        if v is None or image is None:
            return self.last_damping
        error = self.residual_norm
        return A.space.cond(
            self.last_damping > 0, lambda damping: next_damping(A, damping, v, image, error), self.last_damping
        )

    @override
    def with_rtol(self, rtol: float) -> Self:
        """Return the same object, because a copy would have a separate state."""
        return self

    @override
    def record(self, info: SolverInfo) -> None:
        self.counts[Status(info.status).name] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as arrays, numbers, dicts and lists, which `torch.load` reads with ``weights_only``."""
        return {
            "format": FORMAT,
            "solver": repr(self.solver),
            "calls": self.calls,
            "counts": dict(self.counts),
            "adjoint": self.adjoint,
            "previous": self.previous,
            "damping": self.last_damping,
            "image": self.image,
            "residual_norm": self.residual_norm,
            "state": tree.leaves(self.state) if self.loaded is None else self.loaded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from `state_dict`. The next solve moves it to the device of params.

        Raises:
            ValueError: if a key is missing or unknown, or if the format is another.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(
                f"WarmStart.load_state_dict: expected the keys {sorted(expected)}, got {sorted(state)}. This is not a "
                "state of a WarmStart, or it is from another version."
            )
        if state["format"] != FORMAT:
            raise ValueError(f"WarmStart.load_state_dict: expected format {FORMAT}, got {state['format']!r}.")
        self.calls, self.counts = state["calls"], Counter(state["counts"])
        self.adjoint, self.previous, self.image = (state[name] for name in VECTORS)
        self.last_damping, self.residual_norm = state["damping"], state["residual_norm"]
        # All solvers can use the adjoint. Only the same solver can use the prepared state.
        self.state = None
        self.loaded = state["state"] if state["solver"] == repr(self.solver) else []

    def _move(self, A: LinearOperator[V]) -> None:
        """Move loaded vectors to the dtype and device of params, and make the inner solver's state of loaded leaves."""
        space = A.space
        for name in VECTORS:
            kept = self._stored(getattr(self, name), space, dtypes=False)
            setattr(self, name, None if kept is None else space.unravel(space.ravel(kept)))
        if self.loaded:  # the structure, dtypes and devices of a state do not depend on the operator
            like = self.solver.init(LinearOperator(space, lambda v: v))
            leaves = zip(self.loaded, tree.leaves(like), strict=True)
            self.state = tree.with_leaves(like, [s if is_python_value(a) else _to(s, a, space) for s, a in leaves])
        self.loaded = None

    def _stored(self, vector: object, space: Space[V], dtypes: bool = True) -> V | None:
        """Return a stored vector. Raise a ValueError if its structure, shapes or ``dtypes`` differ from params."""
        found, expected = space.layout(vector), space.layout(space.like)
        shapes = [{path: leaf if dtypes else leaf[0] for path, leaf in layout.items()} for layout in (found, expected)]
        if vector is not None and shapes[0] != shapes[1]:
            raise ValueError(
                "WarmStart: the stored adjoint has another structure than params, or other shapes or dtypes. Use one "
                "WarmStart for each problem, or call reset()."
            )
        return vector  # pyright: ignore[reportReturnType]


def _to(array: object, like: Any, space: Space[V]) -> object:
    """Return an array in the dtype and on the device of another."""
    return type(space)(like).unravel(space.ravel(array))  # pyright: ignore[reportArgumentType]
