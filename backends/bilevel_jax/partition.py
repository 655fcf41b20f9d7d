"""Divide trees into arrays and a rest.

`partition` makes a rest that is compared by its value, for the key of a compiled function. `split_arrays` takes any
leaves, and its rest is used inside of one call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from inspect import signature
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.linear_solvers import LinearSolver
from bilevel.methods import Method
from bilevel.preconditioners import Preconditioner
from bilevel.problems.protocols import BilevelProblem
from bilevel.trainings import Condition

_NUMBERS = (jax.Array, np.floating, float)
_NUMERIC = "biufcV"  # kinds of dtypes; V: bfloat16 and the like
_FUNCTIONS = (
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    np.ufunc,
    jax.custom_jvp,
    jax.custom_vjp,
    type(jax.jit(lambda: 0)),
)
_CONSTANTS = (bool, int, float, str, bytes, type(None), Enum, type, np.dtype, np.integer, np.bool_, *_FUNCTIONS)
_SOLVERS = (LinearSolver, Method, Preconditioner)


class Static:
    """Base class of objects that `partition` compares by their value, as a whole."""


_DYNAMIC = object()  # marks the place of an array or a float
Divided = tuple[Any, tuple[Any, ...]]
"""The structure of a tree, and for each leaf what `_split` returns."""


def partition(tree: object, arrays: list[object]) -> Divided:
    """Append the arrays and floats of a tree to a list. Return the rest, which is compared by its value.

    A solver is divided into its options, and so is a solver inside a solver. A problem is compared as a whole.

    Raises:
        TypeError: if a leaf has no value to compare.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(_split(leaf, arrays) for leaf in leaves)


def combine(static: Divided, arrays: Iterator[object]) -> Any:
    """Return the tree that `partition` has divided. Take its arrays and floats from an iterator."""
    structure, leaves = static
    return jax.tree.unflatten(structure, [_join(leaf, arrays) for leaf in leaves])


class Rest(NamedTuple):
    """A tree without its arrays: its structure, and its leaves with None in place of each array.

    JAX counts None as structure, so no other leaf is None.
    """

    structure: Any
    others: list[object]

    def fill(self, arrays: Sequence[object]) -> list[object]:
        """Return the leaves with these arrays."""
        supply = iter(arrays)
        return [next(supply) if other is None else other for other in self.others]

    def join(self, arrays: Sequence[object]) -> Any:
        """Return the tree with these arrays."""
        return jax.tree.unflatten(self.structure, self.fill(arrays))


def split_arrays(tree: object) -> tuple[list[jax.Array], Rest]:
    """Return the arrays of a tree, and the rest of it."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, Rest(structure, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves])


def _split(leaf: object, arrays: list[object]) -> object:
    """Return the static part of a leaf. Append its arrays and floats to a list.

    It is ``_DYNAMIC`` for an array or a float, (type, options) for a solver, and (None, (type, value)) for a constant.
    """
    # Arrays are first, since each leaf of each call passes here, and a test for a protocol takes long.
    if isinstance(leaf, _NUMBERS) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in _NUMERIC):
        arrays.append(leaf)
        return _DYNAMIC
    if isinstance(leaf, _SOLVERS) and not isinstance(leaf, type):
        # Only a frozen dataclass is safe to compare and to rebuild.
        if not is_dataclass(leaf) or not _rebuildable(type(leaf)):
            raise TypeError(f"{type(leaf).__name__} cannot be rebuilt from its fields.")
        return type(leaf), tuple((field.name, _option(getattr(leaf, field.name), arrays)) for field in fields(leaf))
    if not isinstance(leaf, (*_CONSTANTS, Static, Condition, BilevelProblem)):
        raise TypeError(f"{type(leaf).__name__} cannot be compared by its value.")
    return None, (type(leaf), leaf)  # the type, because 1 == True


def _option(value: object, arrays: list[object]) -> Divided:
    if isinstance(value, float) and value == 0:  # it stays a constant, because it often turns an option off
        return jax.tree.structure(0), ((None, (float, value)),)
    return partition(value, arrays)


def _join(static: Any, arrays: Iterator[object]) -> object:
    """Return the leaf that `_split` has divided."""
    if static is _DYNAMIC:
        return next(arrays)
    make, content = static
    if make is None:
        return content[1]
    return make(**{name: combine(option, arrays) for name, option in content})


@cache
def _rebuildable(make: Any) -> bool:
    """Return whether a dataclass is frozen and takes only its fields as arguments (no InitVar, for example)."""
    return make.__dataclass_params__.frozen and list(signature(make).parameters) == [f.name for f in fields(make)]
