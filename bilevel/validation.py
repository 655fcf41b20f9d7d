"""Checks of arguments. Errors name a leaf by its path."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Signature, signature
from numbers import Real
from typing import Any, ParamSpec, TypeVar, get_args

from bilevel.backend import Backend
from bilevel.config import get_backend, imported_backends
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.methods.method import Method
from bilevel.micro_batches import MicroBatches, Reduction
from bilevel.options import check_choice
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient
from bilevel.spaces.array import Args

Q = ParamSpec("Q")
R = TypeVar("R")

TREES = (
    "A tree consists of dicts, lists and tuples of arrays. For a module, use dict(module.named_parameters()) in "
    "torch, nnx.state(module, nnx.Param) in Flax, eqx.filter(module, eqx.is_inexact_array) in Equinox. Convert a "
    "number by np.array, torch.tensor or jnp.asarray."
)


def check_problem(problem: object) -> None:
    """Raise a TypeError unless this is a bilevel problem."""
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            "problem: expected bl.Problem(inner, outer), bl.Proximal, bl.Projected, bl.Constrained, bl.FixedPoint or "
            f"bl.Root, got {type(problem).__name__}."
        )


def find_backend(
    spec: Backend | str | None, params: object, hparams: object, names: tuple[str, str] = ("params", "hparams")
) -> Backend:
    """Return the given backend, or the backend of the arrays. Raise a TypeError unless there is exactly one."""
    if spec is not None:
        return get_backend(spec)
    owners = [
        (name + path, backend)
        for backend in imported_backends()
        for name, tree in zip(names, (params, hparams), strict=True)
        for path, leaf in backend.leaves(tree)
        if backend.owns(leaf)
    ]
    if not owners:
        for name, tree in zip(names, (params, hparams), strict=True):
            if isinstance(tree, Real):
                raise TypeError(
                    f"{name} is a number of Python. Write np.array({tree}), torch.tensor({tree}) or "
                    f"jnp.asarray({tree})."
                )
        kinds = type(params).__name__, type(hparams).__name__
        if params is hparams:
            raise TypeError(
                f"{names[0]}: expected a tree of NumPy, torch or JAX arrays, got {kinds[0]} without arrays. {TREES}"
            )
        raise TypeError(
            f"{names[0]} and {names[1]}: expected trees of NumPy, torch or JAX arrays, got {kinds[0]} and {kinds[1]} "
            f"without arrays. {TREES}"
        )
    (first, found), (last, other) = owners[0], owners[-1]
    if found is not other:
        raise TypeError(
            f"{first} is an array of {found.name}, but {last} is an array of {other.name}: "
            f"{names[0]} and {names[1]} must belong to one framework."
        )
    return found


def check_inputs(
    backend: Backend,
    params: object,
    hparams: object,
    inner_args: object = (),
    outer_args: object = (),
    adjoint0: object = None,
) -> list[Args]:
    """Return the list of batches of the inner arguments.

    Raises:
        TypeError: if a leaf of params or hparams belongs to another framework or is not floating-point, or if arguments
            are not a tuple or `MicroBatches`. inner_args may also be a list of tuples, one per batch.
        ValueError: for empty trees, different devices, an adjoint0 unlike params, or an empty list of batches.
    """
    if params is None or hparams is None:
        raise ValueError(f"{'params' if params is None else 'hparams'} is None.")
    check_trees(backend, {"params": params, "hparams": hparams, "adjoint0": adjoint0}, {"adjoint0": "params"})
    if not backend.space(params).size:
        raise ValueError("params has no entries: all its leaves are empty.")
    batches = check_batches(backend, "inner_args", inner_args)
    _check_args(backend, "outer_args", outer_args)
    return batches


def check_batches(backend: Backend, name: str, args: object) -> list[Args]:
    """Return a list of arguments as it is, and one tuple or `MicroBatches` as a list with it.

    Raise a TypeError for other values, and a ValueError for an empty list.
    """
    hint = f" A list holds one tuple per batch, as in {name}=[(x0, y0), (x1, y1)]."
    if not isinstance(args, list):
        _check_args(backend, name, args, hint)
        return [args]  # pyright: ignore[reportReturnType]
    if not args:
        raise ValueError(f"{name}: the list has no batch. If there are no arguments, leave {name} out.")
    for i, batch in enumerate(args):
        _check_args(backend, f"{name}[{i}]", batch, hint)
    return args


def _check_args(backend: Backend, name: str, args: object, hint: str = "") -> None:
    if isinstance(args, MicroBatches):
        check_micro_batches(backend, name, args)
    elif not isinstance(args, tuple):
        kind = "an array" if backend.owns(args) else type(args).__name__
        if backend.owns(args) or isinstance(args, Mapping):
            hint = f" For a single argument, write {name}=(x,).{hint}"
        elif isinstance(args, Iterable) and not isinstance(args, list) and not backend.compiles:
            hint = f" For a loader of micro-batches, write {name}=bl.MicroBatches(loader).{hint}"
        raise TypeError(f"{name}: expected a tuple of arguments, as in {name}=(x, y), got {kind}.{hint}")


def check_micro_batches(backend: Backend, name: str, batches: MicroBatches) -> None:
    """Raise a TypeError or ValueError for options that are out of range, or data that cannot be read twice."""
    data, size, reduction, weights = batches
    check_choice("MicroBatches.reduction", reduction, get_args(Reduction))
    whole = isinstance(data, tuple)
    if whole != (size is not None):
        raise TypeError(
            f"{name}: MicroBatches takes a tuple of whole arrays and size=, as in bl.MicroBatches((x, y), size=250), "
            f"or a list or a loader of micro-batches without size=. Got {type(data).__name__} and size={size!r}."
        )
    if size is not None and not (type(size) is int and size > 0):
        raise ValueError(f"MicroBatches.size: expected an integer > 0, got {size!r}.")
    if whole or isinstance(data, list):
        if weights is not None and not whole and len(weights) != len(data):
            raise ValueError(f"{name}: MicroBatches has {len(data)} micro-batches and {len(weights)} weights.")
        return
    if backend.compiles:
        raise TypeError(
            f"{name}: compiled code cannot read a {type(data).__name__}. Pass a list of micro-batches, or whole arrays "
            "as in bl.MicroBatches((x, y), size=250)."
        )
    if backend.owns(data) or not isinstance(data, Iterable) or iter(data) is data:
        raise TypeError(
            f"{name}: MicroBatches needs a list of micro-batches, or a loader that can be read again for each product, "
            f"got {type(data).__name__}. An iterator or generator can be read only once: put its items in a list."
        )


def check_trees(backend: Backend, trees: dict[str, object], like: dict[str, str]) -> None:
    """Raise unless these are trees of floating-point arrays on one device. None is an absent tree.

    ``like`` maps the name of a tree to the name of another tree that must have the same structure, shapes and dtypes.
    """
    first: tuple[str, str] | None = None
    for name, tree in trees.items():
        if isinstance(tree, Hypergradient):
            raise TypeError(f"{name} is a Hypergradient. Pass one of its trees, such as hg.adjoint.")
        leaves = [] if tree is None else backend.leaves(tree)
        if tree is not None and not leaves:
            raise ValueError(f"{name} has no leaves: there is nothing to differentiate.")
        for path, leaf in leaves:
            where = _check_leaf(backend, name + path, leaf)
            if where is not None and first is not None and where != first[1]:
                raise ValueError(f"{name}{path} is on {where}, but {first[0]} is on {first[1]}: move one of them.")
            first = first or (where and (name + path, where)) or None
    for name, other in like.items():
        if trees[name] is not None:
            check_like(backend, name, trees[name], other, trees[other])
            check_dtypes(backend, name, trees[name], other, trees[other])


def _check_leaf(backend: Backend, path: str, leaf: Any) -> str | None:
    if not backend.owns(leaf):
        raise TypeError(f"{path}: expected an array of {backend.name}, got {type(leaf).__name__}. {TREES}")
    if not backend.is_floating(leaf):
        if "complex" in str(leaf.dtype):
            way_out = (
                "Use its real and imaginary parts (torch.view_as_real, or x.real and x.imag), and join them inside the "
                "losses."
            )
        else:
            way_out = "Convert it, or leave it out: other arrays reach functions through inner_args and outer_args."
        raise TypeError(
            f"{path}: expected a floating-point leaf, got {leaf.dtype} of shape {tuple(leaf.shape)}. {way_out}"
        )
    backend.check_leaf(path, leaf)
    return backend.device(leaf)


def check_dtypes(backend: Backend, name: str, tree: object, other: str, reference: object) -> None:
    """Raise a TypeError unless two trees of one structure have the same dtypes."""
    for (path, leaf), (_, like) in zip(backend.leaves(tree), backend.leaves(reference), strict=True):
        if leaf.dtype != like.dtype:
            raise TypeError(f"{name}{path} is {leaf.dtype}, but {other}{path} is {like.dtype}: convert one of them.")


def check_like(backend: Backend, name: str, tree: object, other: str, reference: object) -> None:
    """Raise a ValueError unless two trees of arrays have the same structure and shapes."""
    leaves = backend.leaves(tree)
    for path, leaf in leaves:
        if not backend.owns(leaf):
            raise TypeError(f"{name}{path}: expected an array of {backend.name}, got {type(leaf).__name__}.")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    expected = {path: tuple(leaf.shape) for path, leaf in backend.leaves(reference)}
    for path in [*expected, *shapes]:
        if shapes.get(path) != expected.get(path):
            of_tree, of_other = _at(name, path, shapes), _at(other, path, expected)
            raise ValueError(f"{name}{path}: expected the structure of {other}. {of_other}, but {of_tree}.")


def _at(name: str, path: str, shapes: dict[str, tuple[int, ...]]) -> str:
    if path in shapes:
        return f"{name}{path} has shape {shapes[path]}"
    return f"{name} has no leaf {path}" if path else f"{name} is no array"


def check_stateless(backend: Backend, solver: LinearSolver[Any] | Method) -> None:
    """Raise a TypeError if a solver keeps a state and the backend compiles."""
    if solver.stateful and backend.compiles:
        raise TypeError(
            f"{type(solver).__name__} keeps a state between calls, which is not possible in compiled code. Return "
            "hg.adjoint from your step, and pass adjoint0=hg.adjoint to the next call. To reuse a step size, sketch or "
            "preconditioner, pass the solver that bl.prepare returns."
        )


def leaf_names(backend: Backend, name: str, tree: object) -> str:
    """Return the paths of the leaves of a tree, for an error."""
    return ", ".join(name + path for path, _ in backend.leaves(tree)) or name


def depends_on_nothing(backend: Backend, label: str, params: object, hparams: object) -> str:
    """Return the beginning of an error about an objective without any derivative."""
    in_params = leaf_names(backend, "params", params)
    if label == "inner":
        return f"inner does not depend on {in_params}"
    return f"{label} depends on neither {in_params} nor {leaf_names(backend, 'hparams', hparams)}"


@contextmanager
def wrong_calls_named(problem: object, inner_args: Args, outer_args: Args | None) -> Iterator[None]:
    """Explain a TypeError if an objective cannot be called with its arguments.

    ``outer_args`` is None where the outer objective is not evaluated.
    """
    try:
        yield
    except TypeError as error:
        functions = {f.name: getattr(problem, f.name) for f in fields(problem)} if is_dataclass(problem) else {}
        if "positional argument" not in str(error):  # Python's words for a call that does not fit
            raise
        for label in ("prox", "project"):  # they receive no inner_args
            functions.pop(label, None)
        for label, function in functions.items():
            name, args = ("outer_args", outer_args) if label == "outer" else ("inner_args", inner_args)
            args = args.first() if isinstance(args, MicroBatches) else args
            known = signature_of(function) if args is not None and callable(function) else None
            if args is not None and known is not None and not accepts(known, 2 + len(args)):
                given = 2 + len(args)
                if any(accepts(known, fewer) for fewer in range(given)):
                    way_out = f"Give it {given} parameters: params and hparams come first, also if they are not used."
                else:
                    way_out = f"Pass its further arguments by {name}=(...)."
                raise TypeError(
                    f"{label} is called with (params, hparams, *{name}), and {name} has {len(args)} entries. Its "
                    f"signature is ({', '.join(known.parameters)}). {way_out}"
                ) from error
        raise


def takes_problem(function: Callable[Q, R]) -> Callable[Q, R]:
    """Explain a call with two losses in place of a problem, as `bilevel_torch` has it under the same name."""

    @wraps(function)
    def call(*args: Q.args, **options: Q.kwargs) -> R:
        if len(args) == 4:
            raise TypeError(
                f"bl.{function.__name__} expects (problem, params, hparams), got 4 arguments by position. For two "
                f"functions, pass bl.Problem(inner, outer). In PyTorch, bilevel_torch.{function.__name__} takes two "
                "losses, params and hparams."
            )
        return function(*args, **options)

    return call


def signature_of(function: Callable[..., object]) -> Signature | None:
    """Return the signature of a function, or None: some functions of C have none."""
    try:
        return signature(function)
    except (TypeError, ValueError):
        return None


def accepts(known: Signature, count: int) -> bool:
    """Return whether a function can be called with a number of arguments by position."""
    try:
        known.bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_scalar(label: str, value: Any) -> None:
    """Raise a TypeError unless an objective returns a floating-point array, and a ValueError unless its shape is ()."""
    _check_floating(label, value, "scalar array")
    if shape := tuple(value.shape):
        raise ValueError(f"{label}: expected a scalar, got an array of shape {shape}. Take its mean or sum.")


def check_values(values: Any) -> None:
    """Raise a TypeError unless outer returns a floating-point array, and a ValueError unless its shape is (Q,)."""
    _check_floating("outer", values, "vector")
    if len(shape := tuple(values.shape)) != 1 or not shape[0]:
        raise ValueError(
            f"outer: expected an array of Q values, one for each query, got an array of shape {shape}. Return the "
            "losses of the queries without taking their mean. Or pass a list with one tuple of arguments for each "
            "query, outer_args=[(x0, y0), (x1, y1)], and return a scalar."
        )


def _check_floating(label: str, value: Any, kind: str) -> None:
    if not hasattr(value, "shape"):
        hint = " Return the loss alone, without aux." if isinstance(value, tuple) else ""
        raise TypeError(f"{label}: expected a {kind}, got {type(value).__name__}.{hint}")
    if not str(value.dtype).rpartition(".")[2].startswith(("float", "bfloat")):
        kind = kind.removesuffix(" array")
        raise TypeError(f"{label}: expected a floating-point {kind}, got {value.dtype}, which has no derivative.")
