"""The base class of backends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np

from bilevel.linearization import Inputs, LinearizedMap, OuterDerivatives
from bilevel.micro_batches import MicroBatches
from bilevel.spaces.array import Args, H, Number, P, V
from bilevel.spaces.space import Space, State
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.steps import Steps

if TYPE_CHECKING:
    from bilevel.problems.model_loss import ModelLoss

Rest = ParamSpec("Rest")
R = TypeVar("R")
Data = Literal["inner", "outer"]
"""The data that an objective is a mean over: the training data or the validation data."""


class Backend:
    """A framework with derivatives of objectives and maps, and with trees of arrays as vectors.

    Write a subclass. The methods with a body suit frameworks that run step by step and have no trees. The decorator
    `bilevel.batch_sums.over_micro_batches` extends a method for one batch of data to `bilevel.MicroBatches`.

    Attributes:
        name: the name of the backend and of the framework's top-level module.
        compiles: whether `run` compiles. Then no object can keep a state between calls.
        requires_all_ranks: whether all processes must take part in each product.
        differentiates_arrays: whether derivatives are by array objects, so that an objective may read its arguments
            from elsewhere and still depend on them.
        can_store_graphs: whether a scan can collect `LinearizedMap` objects, and storing them is cheaper than computing
            them again.
    """

    name: str
    compiles: ClassVar[bool] = False
    requires_all_ranks: ClassVar[bool] = False
    differentiates_arrays: ClassVar[bool] = False
    can_store_graphs: ClassVar[bool] = False

    @abstractmethod
    def owns(self, leaf: object) -> bool:
        """Tell whether a leaf is an array of this framework."""
        raise NotImplementedError

    @abstractmethod
    def space(self, tree: V) -> Space[V]:
        """Return the space of vectors that are like a tree of arrays."""
        raise NotImplementedError

    @abstractmethod
    def inner(self, objective: Any, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Linearize the gradient ∂L/∂w of an inner objective at a point."""
        raise NotImplementedError

    @abstractmethod
    def outer(
        self, objective: Any, params: P, hparams: H, args: Args, *, label: str = "outer", data: Data = "outer"
    ) -> OuterDerivatives[P, H]:
        """Evaluate objective(params, hparams, *args) -> scalar, with its first derivatives.

        ``label`` is the name of the objective in errors. ``data`` is the data that the objective is a mean over, which
        matters if ranks have different numbers of samples.
        """
        raise NotImplementedError

    def outers(self, objective: Any, params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        """Evaluate objective(params, hparams, *args) -> Q values, of shape (Q,), with the first derivatives of each.

        All leaves of the result have a leading axis of length Q, which is at least 1.
        """
        raise TypeError(
            f"outer: the {self.name} backend has no outer objectives with several values. Pass a list with one tuple "
            "of arguments for each query, outer_args=[(x0, y0), (x1, y1)], and return a scalar."
        )

    def gauss_newton(self, inner: ModelLoss, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Linearize ∂L/∂w, with Gauss-Newton products for ``vjp_params``."""
        raise TypeError(
            f'curvature="gauss-newton": the {self.name} backend derives no Gauss-Newton products. If an objective '
            'has analytic derivatives, return the products from its hvp, with curvature="hessian".'
        )

    def jacobian(
        self, function: Callable[..., object], params: P, hparams: H, args: Args, label: str
    ) -> LinearizedMap[P, H]:
        """Linearize a map from params to trees like params. ``label`` is the name of the map in errors."""
        raise TypeError(f"{label}: the {self.name} backend has no derivatives of fixed points and roots.")

    def fold(
        self, batches: MicroBatches, body: Callable[[State, Args, Number], State], state: State
    ) -> tuple[State, Number]:
        """Pass a state through body(state, args, weight) for each micro-batch. Return it, and the sum of the weights.

        Only one micro-batch may be in use at a time.
        """
        total: Number = 0
        for args, weight in batches.parts():
            state, total = body(state, args, weight), total + weight
        return state, total

    def steps(self, step: Callable[..., Any]) -> Steps:
        """Return the steps of a training run, which `bl.metagradient` differentiates."""
        raise TypeError(f"step: the {self.name} backend has no derivatives of training steps.")

    def leaves(self, tree: object) -> Sequence[tuple[str, Any]]:
        """Return the leaves with their paths, such as ``"['layer'][0]"``."""
        return list(leaves_with_paths(tree))

    def map(self, function: Callable[[Any], Any], tree: V) -> V:
        """Apply a function to each leaf, which may be anything. Keep the structure."""
        return tree_map(function, tree)

    @abstractmethod
    def is_floating(self, leaf: Any) -> bool:
        """Tell whether an array holds real floating-point numbers."""
        raise NotImplementedError

    def device(self, leaf: Any) -> str | None:
        """Return the device of an array; ``None`` if the framework moves arrays automatically."""
        return None

    def devices(self) -> list[str]:
        """Return the devices that this framework can use, for `bilevel info`."""
        return ["cpu"]

    def check_leaf(self, path: str, leaf: Any) -> None:
        """Raise an error for an array whose derivatives would be wrong."""

    def to_host(self, scalar: Any) -> Any:
        """Return a scalar as a Python number; ``None`` if it is traced."""
        return scalar.item()

    @abstractmethod
    def from_numpy(self, array: Any) -> Any:
        """Return a NumPy array as an array of this framework, with the same dtype if the framework has it."""
        raise NotImplementedError

    @abstractmethod
    def to_numpy(self, array: Any) -> Any:
        """Return an array as a NumPy array on the host."""
        raise NotImplementedError

    def to_bytes(self, array: Any) -> np.ndarray:
        """Return an array as a NumPy array that `numpy.save` can store, to the last bit."""
        return np.array(self.to_numpy(array))

    def from_bytes(self, array: np.ndarray, like: Any) -> Any:
        """Return the array that `to_bytes` has converted. ``like`` has its shape, dtype and device."""
        return self.from_numpy(array.reshape(like.shape))

    def to_flat(self, tree: object) -> np.ndarray:
        """Return the entries of a tree as a float64 NumPy array of shape (n,)."""
        return np.asarray(self.to_numpy(self.space(tree).ravel(tree)), dtype=np.float64)

    def from_flat(self, array: np.ndarray, like: P) -> P:
        """Return a tree of the structure, shapes, dtypes and devices of ``like`` from an array of shape (n,)."""
        space = self.space(like)
        return space.unravel(self.from_numpy(array.astype(self.to_numpy(space.ravel(like)).dtype)))

    def run(self, function: Callable[Concatenate[Backend, Rest], R], *args: Rest.args, **options: Rest.kwargs) -> R:
        """Call function(backend, *args), compiled if the framework compiles.

        Arrays and floats in the arguments are inputs of the compiled function, also in solvers. Other values are
        compared by value. Pass a function of a module: a closure would be compiled again at each call.
        """
        return function(self, *args, **options)

    def check_settings(self, params: object, *settings: object) -> None:
        """Raise an error if the settings of a call do not suit the backend. In one process, all do."""

    def located(self, find: Callable[[Backend], str], *losses: Any) -> str:
        """Return what a search for a nan finds by products of one process.

        Args:
            find: the search. It returns "" if it finds nothing.
            losses: the values of the two losses, if their graphs are there.
        """
        return find(self)

    @property
    def by_rows(self) -> Backend:
        """The backend for functions that `batched` calls."""
        return self

    def batched(self, function: Callable[..., R], *stacks: Any) -> R:
        """Apply a function of trees to each row of stacks, which are trees of arrays with a leading axis.

        Return the stack of its results, which are trees of arrays. The function must take all spaces from `by_rows`. It
        reads no flags, so that a backend may run all rows together. This default takes one row after the other.
        """
        space = self.space(stacks)
        rows = [space.map(lambda a, i=i: a[i], stacks) for i in range(len(space.leaves(stacks)[0]))]
        return stacked(self, [function(*row) for row in rows])

    @contextmanager
    def isolated(self, inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
        """Undo the side effects of objectives on exit: changes of random states, buffers of modules, and inputs.

        The context yields ``at(params, hparams)``, which returns the inputs moved to other values. It also moves the
        arrays that objectives use in place of their arguments, as far as possible. Each call of ``at`` restores the
        random states and buffers of the start. It may overwrite the arrays that the last call returned. With
        ``double``, the moved inputs and the arrays of the objectives are in float64, as far as possible. This default
        only moves the inputs.
        """
        del double
        yield lambda params, hparams: inputs._replace(params=params, hparams=hparams)


def stacked(backend: Backend, trees: Sequence[R]) -> R:
    """Return trees of arrays as one tree, whose leaves have a leading axis."""
    space = backend.space(trees[0])
    return space.map(lambda *leaves: space.leaf_xp.stack(leaves), *trees)
