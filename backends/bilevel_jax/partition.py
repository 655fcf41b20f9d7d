"""What jit compiles for, apart from the arrays, which may change without compiling anew."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from inspect import signature
from types import BuiltinFunctionType, FunctionType
from typing import Any

import jax
import numpy as np

_FUNCTIONS = (FunctionType, BuiltinFunctionType, np.ufunc, jax.custom_jvp, jax.custom_vjp, type(jax.jit(lambda: 0)))
_CONSTANTS = (bool, int, float, str, bytes, type(None), Enum, type, np.dtype, np.integer, np.bool_, *_FUNCTIONS)


def split_tree(tree: Any, arrays: list[Any]) -> tuple[Any, ...]:
    """Move the arrays and floats of a tree to the end of a list; return the rest, to be compared by its value.

    Raises:
        TypeError: if something in it has no value to compare.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(_split_leaf(leaf, arrays) for leaf in leaves)


def join_tree(static: tuple[Any, ...], arrays: Iterator[Any]) -> Any:
    """Return the tree."""
    structure, leaves = static
    return jax.tree.unflatten(structure, [next(arrays) if leaf is None else leaf[1] for leaf in leaves])


def split_solver(solver: Any, arrays: list[Any]) -> tuple[Any, ...]:
    """Do the same for the options of a solver, and of a solver among them.

    Only what a frozen dataclass is made of is safe to compare and to rebuild. A zero stays a constant: it often
    switches something off.
    """
    if not is_dataclass(solver) or isinstance(solver, type):
        zero = isinstance(solver, float) and solver == 0
        return (None, (jax.tree.structure(0), ((float, solver),)) if zero else split_tree(solver, arrays))
    if not _rebuildable(type(solver)):
        raise TypeError(f"{type(solver).__name__} cannot be rebuilt from its fields.")
    options = tuple((field.name, split_solver(getattr(solver, field.name), arrays)) for field in fields(solver))
    return type(solver), options


def join_solver(static: tuple[Any, ...], arrays: Iterator[Any]) -> Any:
    """Return the solver."""
    make, options = static
    if make is None:
        return join_tree(options, arrays)
    return make(**{name: join_solver(option, arrays) for name, option in options})


@cache
def _rebuildable(make: Any) -> bool:
    """Tell whether a dataclass is frozen and takes its fields and nothing else (an InitVar, say)."""
    return make.__dataclass_params__.frozen and list(signature(make).parameters) == [f.name for f in fields(make)]


def _split_leaf(leaf: Any, arrays: list[Any]) -> tuple[type, Any] | None:
    number = isinstance(leaf, jax.Array | np.floating | float)
    if number or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufcV"):  # V: bfloat16 and its like
        arrays.append(leaf)
        return None
    if not isinstance(leaf, _CONSTANTS):
        raise TypeError(f"{type(leaf).__name__} cannot be compared by its value.")
    return type(leaf), leaf  # 1 is not True
