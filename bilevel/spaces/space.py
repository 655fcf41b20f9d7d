"""What a solver sees of a framework: its trees of arrays as vectors, and its loops."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

Stack = Any  # several vectors of one structure, itself a tree for normal_like and map
Tree = Any  # nested dicts, lists, tuples of arrays, or whatever tree the backend knows
Scalar = Any  # a zero-dimensional array of the framework
Operator = Callable[[Tree], Tree]
State = TypeVar("State")


class VectorSpace(Protocol):
    """Trees of arrays as vectors, and loops: all that a solver may use.

    Scalars are zero-dimensional arrays on the device of the data. Scalar multiples keep the dtypes of
    the vector; dots accumulate in at least float32.
    """

    @property
    def xp(self) -> Any:
        """The framework's array namespace, for functions of scalars: ``where``, ``sqrt``, ``isfinite``."""
        ...

    def dot(self, x: Tree, y: Tree) -> Scalar: ...
    def axpy(self, alpha: Scalar, x: Tree, y: Tree) -> Tree:
        """Return alpha x + y."""
        ...

    def scale(self, alpha: Scalar, x: Tree) -> Tree: ...
    def update(self, flag: Scalar, alpha: Scalar, x: Tree, y: Tree, beta: Scalar | None = None) -> Tree:
        """Return alpha x + beta y where the flag holds, else y; the memory may be that of y, which is used up.

        Without ``beta``, alpha x + y; a nan in what is not chosen does no harm.
        """
        ...

    def zeros_like(self, x: Tree) -> Tree: ...
    def map(self, function: Callable[..., Any], x: Tree, *rest: Tree) -> Tree:
        """Apply an entrywise function to the leaves of trees of one structure; keep the dtypes of the first."""
        ...

    def select(self, flag: Scalar, x: Tree, y: Tree) -> Tree:
        """Return x where the scalar flag holds, else y; a nan in the one not chosen does no harm."""
        ...

    def normal_like(self, x: Tree, seed: int) -> Tree:
        """Draw independent standard normal entries, the same for the same seed."""
        ...

    def max_abs(self, x: Tree) -> Scalar:
        """Return the largest absolute entry, in the dtype of a dot; nan if there is one, 0 if there is no entry."""
        ...

    def isfinite(self, x: Tree) -> Scalar:
        """Tell whether no entry is nan or infinite."""
        ...

    def eps(self, x: Tree) -> float:
        """Return the machine epsilon of the coarsest dtype in the tree."""
        ...

    def size(self, x: Tree) -> int:
        """Return the number of entries."""
        ...

    def stack_like(self, x: Tree, count: int) -> Stack:
        """Return room for ``count`` vectors like x, all zero."""
        ...

    def put(self, stack: Stack, i: Scalar, x: Tree) -> Stack:
        """Return the stack with x in place i; the memory may be that of the old stack, which is used up."""
        ...

    def take(self, stack: Stack, i: Scalar) -> Tree:
        """Return vector i of a stack."""
        ...

    def project(self, stack: Stack, x: Tree) -> Any:
        """Return the dots of x with each vector of a stack, as one array."""
        ...

    def combine(self, coefficients: Any, stack: Stack) -> Tree:
        """Return the sum of coefficients[i] times vector i."""
        ...

    def sequence(self, items: Sequence[Any]) -> Callable[[Any], Any]:
        """Return i -> items[i modulo their number], for an i counted in a loop; any trees, batches of data say."""
        ...

    def while_loop(
        self,
        live: Callable[[State], Scalar],
        body: Callable[[State], State],
        state: State,
        max_steps: int,
    ) -> State:
        """Repeat body while live(state), at most max_steps times.

        The flag may be read only every few steps, to spare an accelerator the synchronisation: a body
        must leave the state unchanged once live(state) is false.
        """
        ...

    def scan(
        self,
        body: Callable[[State, Any], tuple[State, Any]],
        state: State,
        xs: Any | None,
        length: int,
        reverse: bool = False,
    ) -> tuple[State, Any]:
        """Thread a state through ``length`` steps; collect what each yields, for a later scan's ``xs``."""
        ...

    def cond(self, flag: Scalar, body: Callable[[State], State], state: State) -> State:
        """Return body(state) where the flag holds, else the state."""
        ...

    def ravel(self, x: Tree) -> Any:
        """Return the entries as one array of shape (n,)."""
        ...

    def unravel(self, array: Any, like: Tree) -> Tree:
        """Give an array of shape (n,) the structure, shapes and dtypes of ``like``."""
        ...

    def dense(self, operator: Operator, like: Tree) -> Any:
        """Return the matrix of a linear operator, of shape (n, n), from n products."""
        ...

    def on_host(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Call a function of float64 NumPy arrays; return its result like the last argument."""
        ...
