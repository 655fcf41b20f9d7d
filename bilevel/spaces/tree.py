"""Trees of arrays for frameworks without trees: leaves in dicts, lists, tuples and named tuples.

As in JAX, ``None`` is a tree without leaves, and the leaves of a dict are in the order of its sorted keys.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any

_NO_LEAF = (dict, list, tuple, type(None))


def leaves_with_paths(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its path, in order.

    >>> list(leaves_with_paths({"a": 1.0, "b": [2.0, 3.0]}))
    [("['a']", 1.0), ("['b'][0]", 2.0), ("['b'][1]", 3.0)]
    """
    if isinstance(tree, dict):
        for key in _sorted(tree):
            yield from leaves_with_paths(tree[key], f"{path}[{key!r}]")
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for field, child in zip(tree._fields, tree, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
            yield from leaves_with_paths(child, f"{path}.{field}")
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from leaves_with_paths(child, f"{path}[{i}]")
    elif tree is not None:
        yield path, tree


def leaves(tree: Any) -> list[Any]:
    """Return the leaves, in order.

    >>> leaves({"a": 1.0, "b": [2.0, 3.0]})
    [1.0, 2.0, 3.0]
    """
    if _is_flat(tree):
        return tree
    if isinstance(tree, dict):
        return [leaf for key in _sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    return [] if tree is None else [tree]


def with_leaves(tree: Any, new: Iterable[Any]) -> Any:
    """Return a tree of this structure with other leaves.

    >>> with_leaves({"a": 1.0, "b": [2.0, 3.0]}, [10, 20, 30])
    {'a': 10, 'b': [20, 30]}
    """
    if _is_flat(tree):
        return list(new)
    it = iter(new)
    return tree_map(lambda _: next(it), tree)


def _is_flat(tree: Any) -> bool:
    """Tell whether a tree is a list of leaves."""
    if type(tree) is not list:
        return False
    for child in tree:  # noqa: SIM110  (each operation of a solver runs this; a generator takes three times as long)
        if isinstance(child, _NO_LEAF):
            return False
    return True


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply a function to the leaves of trees of one structure, and keep the structure.

    >>> tree_map(lambda x, y: x + y, {"a": 1, "b": (2, 3)}, {"a": 10, "b": (20, 30)})
    {'a': 11, 'b': (22, 33)}
    """
    if tree is None:
        return None
    if isinstance(tree, dict):
        mapped = {key: tree_map(function, tree[key], *(r[key] for r in rest)) for key in _sorted(tree)}
        if type(tree) is dict:
            return {key: mapped[key] for key in tree}  # in the order of the keys of the tree
        like = copy(tree)  # keeps an OrderedDict, or a defaultdict with its factory
        like.update(mapped)
        return like
    if isinstance(tree, list | tuple):
        children = [tree_map(function, *group) for group in zip(tree, *rest, strict=True)]
        if isinstance(tree, list):
            return children
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return function(tree, *rest)


def _sorted(tree: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(tree)
    except TypeError:  # keys of several types
        return sorted(tree, key=lambda key: (type(key).__name__, repr(key)))
