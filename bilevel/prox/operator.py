"""The base class of proximal operators and projections of one array, in NumPy, torch and JAX."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from bilevel.spaces.array import Array
from bilevel.spaces.namespace import namespace
from bilevel.spaces.tree import tree_map

Given = str | float | Array | Sequence[Any] | None
"""Where a value comes from. None: hparams itself. A string: hparams[string]. Otherwise, the value is a constant."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A NumPy array that is compared by its entries, so that equal operators are equal."""

    array: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.array.shape, self.array.dtype.str, self.array.tobytes()


def given(name: str, value: Given, expected: Literal["a number", "numbers >= 0", "a number > 0"] = "a number") -> Any:
    """Return None, a string or a `Constant`.

    Raises:
        TypeError: for other values.
        ValueError: for nan, or a constant that is not ``expected``.
    """
    if value is None or isinstance(value, str | Constant):
        return value
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected None (hparams itself), a string (a key of hparams), a number or an array, got "
            f"{type(value).__name__}."
        ) from error
    least = np.nextafter(0.0, 1.0) if expected == "a number > 0" else 0.0 if expected == "numbers >= 0" else -np.inf
    if not (array >= least).all():
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return Constant(array)


class ProximalOperator:
    """A proximal operator of one array: ``operator(v, hparams, step_size)``.

    In torch and JAX, the backend differentiates `apply`. In NumPy, it calls ``vjp_params`` and ``vjp_hparams``.

    Attributes:
        values: the fields that hold a `Given`.
        logs: the fields whose values in hparams are logarithms. Constants are not.
    """

    values: ClassVar[tuple[str, ...]] = ()
    logs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, v: Any, step: Any, *values: Any) -> Any:
        """Return the result for an array of shape ``v.shape``. ``values`` are the values of the fields `values`."""
        raise NotImplementedError

    @abstractmethod
    def pull(self, v: Any, step: Any, values: Sequence[Any], c: Any) -> tuple[Any, Sequence[Any]]:
        """Return the products of the transposed Jacobians by v and by each value with c, in NumPy."""
        raise NotImplementedError

    def __call__(self, v: Any, hparams: Any, step_size: Any = 1.0) -> Any:
        check_array(type(self).__name__, v)
        return cast(self.apply(v, step_size, *self._values(v, hparams)), v)

    def vjp_params(self, v: Any, hparams: Any, vector: Any, step_size: Any = 1.0) -> Any:
        """Return (∂operator/∂v)ᵀ vector."""
        return self.pull(v, step_size, self._values(v, hparams), vector)[0]

    def vjp_hparams(self, v: Any, hparams: Any, vector: Any, step_size: Any = 1.0) -> Any:
        """Return (∂operator/∂λ)ᵀ vector, like hparams. None if the operator does not depend on hparams."""
        values = self._values(v, hparams)
        products = self.pull(v, step_size, values, vector)[1]
        total = None
        for name, value, product in zip(self.values, values, products, strict=True):
            source = getattr(self, name)
            if isinstance(source, Constant):
                continue
            product = np.asarray(product * value if name in self.logs else product)
            if source is None:
                return product
            total = tree_map(np.zeros_like, hparams) if total is None else total
            total[source] = total[source] + product
        return total

    def _values(self, v: Any, hparams: Any) -> list[Any]:
        return [self._value(name, v, hparams) for name in self.values]

    def _value(self, name: str, v: Any, hparams: Any) -> Any:
        source = getattr(self, name)
        if isinstance(source, Constant):
            return constant_like(source.array, v)
        where = "hparams" if source is None else f"hparams[{source!r}]"
        if isinstance(source, str):
            if not isinstance(hparams, Mapping):
                raise TypeError(
                    f"{type(self).__name__}.{name} is hparams[{source!r}], but hparams is no dict: it is "
                    f"{type(hparams).__name__}."
                )
            if source not in hparams:
                raise ValueError(
                    f"{type(self).__name__}.{name} is hparams[{source!r}], but hparams has the keys {sorted(hparams)}."
                )
        found = hparams if source is None else hparams[source]
        if not hasattr(found, "ndim"):
            raise TypeError(
                f"{type(self).__name__}.{name}: expected an array as {where}, got {type(found).__name__}. Pass "
                f'{name}="key" to use hparams["key"].'
            )
        return namespace(found).exp(found) if name in self.logs else found


class Projection(ProximalOperator):
    """A projection on a convex set: a proximal operator that ignores ``step_size``."""


def check_array(name: str, v: Any) -> None:
    """Raise a TypeError unless this is one array."""
    if not hasattr(v, "ndim"):
        raise TypeError(
            f"{name}: expected params to be one array, got {type(v).__name__}. For a dict of arrays, use "
            'bl.prox.separable({"key": operator}).'
        )


def spread(name: str, value: Any, v: Any) -> Any:
    """Return a value of shape (), v.shape[:1] or v.shape in a shape that broadcasts to v."""
    if tuple(value.shape) != tuple(v.shape[: value.ndim]):
        raise ValueError(
            f"{name}: expected shape () (shared), {tuple(v.shape[:1])} (one for each row of params) or "
            f"{tuple(v.shape)} (one for each entry), got {tuple(value.shape)}."
        )
    return value.reshape(*value.shape, *(1,) * (v.ndim - value.ndim))


def reduced(product: Any, value: Any) -> Any:
    """Return the sums of a product of the shape of params over the entries that share a value (NumPy)."""
    return np.asarray(product.sum(tuple(range(value.ndim, product.ndim))))


def positive_part(x: Any) -> Any:
    """Return max(x, 0), with derivative 1 where x > 0, else 0."""
    return namespace(x).where(x > 0, x, 0 * x)


def soft_threshold(v: Any, threshold: Any) -> Any:
    """Return the proximal operator of threshold · |v|, entry by entry."""
    return positive_part(v - threshold) - positive_part(-v - threshold)


def cast(result: Any, like: Any) -> Any:
    """Return an array in the dtype of another."""
    if result.dtype == like.dtype:
        return result
    return result.to(like.dtype) if hasattr(result, "new_tensor") else result.astype(like.dtype)


def constant_like(array: np.ndarray, like: Any) -> Any:
    """Return a NumPy array in the framework, the dtype and on the device of another."""
    if hasattr(like, "new_tensor"):
        return like.new_tensor(array)
    return namespace(like).asarray(array, dtype=like.dtype)


def without_derivative(x: Any) -> Any:
    """Return an array as a constant."""
    if hasattr(x, "detach"):
        return x.detach()
    return x if isinstance(x, np.ndarray | np.generic) else sys.modules["jax"].lax.stop_gradient(x)
