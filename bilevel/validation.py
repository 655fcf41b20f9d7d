"""Checks of what a caller hands over; each error names the leaf by its path."""

from typing import Any

from bilevel.config import get_backend, imported_backends
from bilevel.protocols import Backend, Point, Tree


def find_backend(spec: Any, params: Tree, hparams: Tree) -> Backend:
    """Return the backend asked for, or the one that owns the arrays.

    Raises:
        TypeError: if the arrays belong to no backend, or to different ones.
    """
    if spec is not None:
        return get_backend(spec)
    trees = (("params", params), ("hparams", hparams))
    owners = [
        (name + path, backend)
        for backend in imported_backends()
        for name, tree in trees
        for path, leaf in backend.leaves(tree)
        if backend.owns(leaf)
    ]
    if not owners:
        raise TypeError(
            f"params and hparams: expected trees of NumPy, torch or JAX arrays, got {type(params).__name__} and "
            f"{type(hparams).__name__} without any. Convert them, or name the backend with backend=."
        )
    (first, found), (last, other) = owners[0], owners[-1]
    if found is not other:
        raise TypeError(
            f"{first} is an array of {found.name}, but {last} one of {other.name}: "
            "params and hparams must be of one framework."
        )
    return found


def check_point(backend: Backend, point: Point) -> None:
    """Raise unless params, hparams and adjoint0 are trees that can be differentiated together.

    Raises:
        TypeError: for leaves of another framework or that are not floating-point, or args that are no tuple.
        ValueError: for empty trees, different devices, or an adjoint0 unlike params.
    """
    first: tuple[str, str] | None = None
    for name in ("params", "hparams", "adjoint0"):
        tree = getattr(point, name)
        if tree is None and name == "adjoint0":
            continue
        leaves = backend.leaves(tree)
        if not leaves:
            raise ValueError(f"{name} has no leaves: there is nothing to differentiate.")
        for path, leaf in leaves:
            where = _check_leaf(backend, name + path, leaf)
            if where is not None and first is not None and where != first[1]:
                raise ValueError(f"{name}{path} is on {where}, but {first[0]} on {first[1]}: move them together.")
            first = first or (where and (name + path, where)) or None
    for name in ("inner_args", "outer_args"):
        if not isinstance(getattr(point, name), tuple | list):
            raise TypeError(
                f"{name}: expected a tuple of arguments, as in {name}=(x, y), "
                f"got {type(getattr(point, name)).__name__}."
            )
    if point.adjoint0 is not None:
        check_like(backend, "adjoint0", point.adjoint0, "params", point.params)


def _check_leaf(backend: Backend, path: str, leaf: Any) -> str | None:
    if not backend.owns(leaf):
        raise TypeError(f"{path}: expected an array of {backend.name}, got {type(leaf).__name__}.")
    if not backend.is_floating(leaf):
        raise TypeError(
            f"{path}: expected a floating-point leaf, got {leaf.dtype} of shape {tuple(leaf.shape)}. "
            "Convert it, or pass it through inner_args and outer_args."
        )
    return backend.device(leaf)


def check_like(backend: Backend, name: str, tree: Tree, other: str, reference: Tree) -> None:
    """Raise a ValueError unless two trees have the same structure and shapes."""
    shapes = {path: tuple(leaf.shape) for path, leaf in backend.leaves(tree)}
    expected = {path: tuple(leaf.shape) for path, leaf in backend.leaves(reference)}
    for path in [*expected, *shapes]:
        if shapes.get(path) != expected.get(path):
            raise ValueError(
                f"{name}{path}: expected the structure of {other}, where this leaf "
                f"{f'has shape {expected[path]}' if path in expected else 'does not exist'}; "
                f"it {f'has shape {shapes[path]}' if path in shapes else 'is missing'}."
            )


def check_scalar(role: str, value: Any) -> None:
    """Raise unless an objective returned one floating-point number: an array of shape ().

    Raises:
        TypeError: if it returned no array.
        ValueError: if it returned another shape.
    """
    if not hasattr(value, "shape"):
        raise TypeError(f"{role}: expected a scalar array, got {type(value).__name__}.")
    if tuple(value.shape) != ():
        raise ValueError(
            f"{role}: expected a scalar, got an array of shape {tuple(value.shape)}. Take its mean or sum."
        )
