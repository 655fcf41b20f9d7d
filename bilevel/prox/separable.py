"""Different operators on the entries of a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.prox.operator import ProximalOperator
from bilevel.spaces.tree import tree_map


def separable(operators: Mapping[str, ProximalOperator]) -> Separable:
    """Return the operator that applies an operator to each of some entries of params, which is a dict.

    The proximal operator of a sum g₁(w₁) + g₂(w₂) + ... (Parikh & Boyd 2014, §2.1). Entries without an operator are
    free, such as an intercept. Operators of `bilevel.prox` and `bilevel.projections` may be mixed.

    Args:
        operators: the operator of each entry, by its key in params.

    Returns:
        An operator (v, hparams, step_size) for `bilevel.Proximal`, also for `bilevel.Projected`.

    Raises:
        TypeError: unless the values are operators of this library; when called, if params is no dict.
        ValueError: when called, if params lacks a key.

    >>> import numpy as np
    >>> from bilevel import prox
    >>> operator = separable({"w": prox.l1(1.0)})
    >>> operator({"w": np.array([3.0]), "intercept": np.array(0.5)}, None, 1.0)
    {'w': array([2.]), 'intercept': array(0.5)}
    """
    for key, operator in operators.items():
        if not isinstance(operator, ProximalOperator):
            raise TypeError(
                f"separable: expected an operator of bl.prox or bl.projections for {key!r}, got {operator!r}."
            )
    return Separable(tuple(sorted(operators.items())))


@dataclass(frozen=True)
class Separable:
    """See `separable`."""

    operators: tuple[tuple[str, ProximalOperator], ...]

    def __call__(self, v: Any, hparams: Any, step_size: Any = 1.0) -> Any:
        self._check(v)
        return {**v, **{key: operator(v[key], hparams, step_size) for key, operator in self.operators}}

    def vjp_params(self, v: Any, hparams: Any, vector: Any, step_size: Any = 1.0) -> Any:
        """Return (∂operator/∂v)ᵀ vector."""
        pulled = {key: each.vjp_params(v[key], hparams, vector[key], step_size) for key, each in self.operators}
        return {**vector, **pulled}

    def vjp_hparams(self, v: Any, hparams: Any, vector: Any, step_size: Any = 1.0) -> Any:
        """Return (∂operator/∂λ)ᵀ vector, like hparams. None if no operator depends on hparams."""
        total = None
        for key, operator in self.operators:
            product = operator.vjp_hparams(v[key], hparams, vector[key], step_size)
            if product is not None:
                total = product if total is None else tree_map(lambda a, b: a + b, total, product)
        return total

    def _check(self, v: Any) -> None:
        if not isinstance(v, Mapping):
            raise TypeError(f"separable: expected params to be a dict, got {type(v).__name__}.")
        for key, _ in self.operators:
            if key not in v:
                raise ValueError(f"separable: there is an operator for params[{key!r}], but params has {sorted(v)}.")
