"""The laws of a backend's methods for arrays and trees."""

import importlib.util
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import numpy as np

from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.framework import Framework
from bilevel.testing.conformance.subject import dtype_of
from bilevel.validation import find_backend


class _Pair(NamedTuple):
    left: Any
    right: Any


def name_of_framework(f: Framework) -> None:
    """The backend has the name of its framework's top-level module, by which the core finds the backend of an array."""
    found = importlib.util.find_spec(f.backend.name) is not None
    f.require(found, f"find_spec({f.backend.name!r})", "a module", None)
    if f.backend.name in entry_points(group="bilevel.backends").names:
        x = f.array(np.ones(2))
        f.equal("the backend that bl.hypergradient finds by the arrays", find_backend(None, x, x).name, f.backend.name)


def owns(f: Framework) -> None:
    """The backend owns the arrays that it makes, and no Python object or array of another framework."""
    for shape in ((), (0,), (2, 3)):
        f.equal(f"owns(an array of shape {shape})", bool(f.backend.owns(f.array(np.ones(shape)))), True)
    others = [1.0, 1, "a", None, [], object()]
    if f.backend.name != "numpy":
        others.append(np.ones(2))
    for other in others:
        f.equal(f"owns({other!r})", bool(f.backend.owns(other)), False)


def leaves_and_paths(f: Framework) -> None:
    """Leaves have paths, dicts are in the order of their keys, and None is a tree without leaves."""
    x, y, z = (f.array(np.full(2, float(i))) for i in range(3))
    trees = {
        "an array": (x, [("", x)]),
        "dicts, lists and tuples": ({"b": [x, (y,)], "a": z}, [("['a']", z), ("['b'][0]", x), ("['b'][1][0]", y)]),
        "a named tuple": (_Pair(x, {"k": y}), [(".left", x), (".right['k']", y)]),
        "None": (None, []),
        "None among others": ([None, x], [("[1]", x)]),
    }
    for what, (tree, expected) in trees.items():
        got = list(f.backend.leaves(tree))
        f.equal(f"paths of {what}", [path for path, _ in got], [path for path, _ in expected])
        same = all(a is b for (_, a), (_, b) in zip(got, expected, strict=True))
        f.require(same, f"leaves of {what}", "the arrays themselves", got)


def shapes_and_dtypes(f: Framework) -> None:
    """An array has a shape, and a dtype with NumPy's name, perhaps after the framework's name."""
    for shape in ((), (0,), (2, 3)):
        array = f.array(np.ones(shape))
        f.equal("tuple(array.shape)", tuple(array.shape), shape)
        f.equal("array.dtype", dtype_of(array), f.dtype)


def is_floating(f: Framework) -> None:
    """Only real floating-point arrays are floating, not integers or flags."""
    f.equal("is_floating of floats", bool(f.backend.is_floating(f.array(np.ones(2)))), True)
    for values in (np.ones(2, np.int32), np.ones(2, bool)):
        got = bool(f.backend.is_floating(f.backend.from_numpy(values)))
        f.equal(f"is_floating of {values.dtype}", got, False)


def devices(f: Framework) -> None:
    """There is a device, and the device of an array is a name or None."""
    names = f.backend.devices()
    f.require(names and all(isinstance(name, str) for name in names), "devices()", "names for people to read", names)
    where = f.backend.device(f.array(np.ones(2)))
    f.require(where is None or isinstance(where, str), "device(array)", "a name or None", where)


def to_host(f: Framework) -> None:
    """Scalars become Python numbers of the same kind."""
    for value in (0.5, 3, True):
        got = f.backend.to_host(f.backend.from_numpy(np.array(value)))
        f.equal(f"to_host({value!r})", (type(got), got), (type(value), value))


def numpy_round_trip(f: Framework) -> None:
    """Conversion to NumPy and back keeps values, shapes and dtypes."""
    for shape in ((), (0,), (2, 3)):
        values = np.arange(np.prod(shape, dtype=int), dtype=f.dtype).reshape(shape)
        back = f.backend.to_numpy(f.backend.from_numpy(values))
        f.equal("to_numpy(from_numpy(array)): shape, dtype", (back.shape, back.dtype), (values.shape, values.dtype))
        f.equal("to_numpy(from_numpy(array))", back, values)


LAWS: list[Law] = [name_of_framework, owns, leaves_and_paths, is_floating, devices, to_host]
PER_DTYPE: list[Law] = [shapes_and_dtypes, numpy_round_trip]
