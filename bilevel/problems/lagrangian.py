"""The Lagrangian of a constrained inner problem on its active set, and objectives of its primal variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.spaces.array import H
from bilevel.spaces.tree import leaves, tree_map

WAY_OUT = (
    "bl.with_multipliers(problem, w, hparams) returns it for a solution w, and bl.constrained_fit(problem) solves the "
    "problem."
)


@dataclass(frozen=True)
class Lagrangian:
    """Φ(p, λ) = L(w, λ) + ν·h(w, λ) + (a∘μ)·g(w, λ) − ½ ‖(1 − a)∘μ‖², with the mask a of the active inequalities.

    p is the dict with w, ν ("equality") and μ ("inequality"). The gradient of Φ is zero at the KKT point with this
    active set. It is called with (p, λ, a, *args), where a is None if there is no inequality.
    """

    objective: Any
    equality: Any
    inequality: Any

    def __call__(self, params: Any, hparams: Any, active: Any, *args: Any) -> Any:
        w = params["w"]
        value = self.objective(w, hparams, *args)
        if self.equality is not None:
            value = value + (params["equality"] * self.equality(w, hparams, *args)).sum()
        if self.inequality is not None:
            multipliers = params["inequality"]
            value = value + (active * multipliers * self.inequality(w, hparams, *args)).sum()
            value = value - 0.5 * ((1 - active) * multipliers**2).sum()
        return value

    def grad(self, params: Any, hparams: Any, active: Any, *args: Any) -> Any:
        """Return ∂Φ/∂p, for the numpy backend."""
        w = params["w"]
        found: dict[str, Any] = {"w": self.objective.grad(w, hparams, *args)}
        for name, constraint, weight in self._constraints(active):
            multipliers = params[name]
            pull = _method(constraint, name, "vjp_params")(w, hparams, weight * multipliers, *args)
            found["w"] = _added(found["w"], pull)
            found[name] = weight * constraint(w, hparams, *args) - (1 - weight) * multipliers
        return found

    def hvp(self, params: Any, hparams: Any, vector: Any, active: Any, *args: Any) -> Any:
        """Return (∂²Φ/∂p²) vector, for the numpy backend."""
        w, u = params["w"], vector["w"]
        found: dict[str, Any] = {"w": self.objective.hvp(w, hparams, u, *args)}
        for name, constraint, weight in self._constraints(active):
            pull = _method(constraint, name, "vjp_params")(w, hparams, weight * vector[name], *args)
            curved = _method(constraint, name, "hvp")(w, hparams, weight * params[name], u, *args)
            found["w"] = _added(found["w"], pull, curved)
            push = _method(constraint, name, "jvp_params")(w, hparams, u, *args)
            found[name] = weight * push - (1 - weight) * vector[name]
        return found

    def cross_vjp(self, params: Any, hparams: Any, vector: Any, active: Any, *args: Any) -> Any:
        """Return (∂²Φ/∂λ∂p)ᵀ vector, for the numpy backend. None: it is zero."""
        w, u = params["w"], vector["w"]
        found = [self.objective.cross_vjp(w, hparams, u, *args)]
        for name, constraint, weight in self._constraints(active):
            found.append(_method(constraint, name, "vjp_hparams")(w, hparams, weight * vector[name], *args))
            found.append(_method(constraint, name, "cross_vjp")(w, hparams, weight * params[name], u, *args))
        known = [product for product in found if product is not None]
        return _added(*known) if known else None

    def _constraints(self, active: Any) -> list[tuple[str, Any, Any]]:
        """Return the name of the multipliers, the function and the weights of each kind of constraint."""
        given = [("equality", self.equality, 1.0), ("inequality", self.inequality, active)]
        return [kind for kind in given if kind[1] is not None]


@dataclass(frozen=True)
class OfPrimal:
    """An outer objective F(w, λ, *args) as a function of the dict with w and the multipliers."""

    outer: Callable[..., Any]

    def __call__(self, params: Any, hparams: Any, *args: Any) -> Any:
        return self.outer(primal(params), hparams, *args)

    def grad(self, params: Any, hparams: H, *args: Any) -> tuple[Any, H | None]:
        """Return (∂F/∂p, ∂F/∂λ), for the numpy backend. The gradients may have a leading axis."""
        by_w, by_hparams = _method(self.outer, "outer", "grad")(primal(params), hparams, *args)
        one, of_one = leaves(by_w)[0], leaves(params["w"])[0]
        rows = np.shape(one)[: np.ndim(one) - np.ndim(of_one)]
        zeros = {name: np.zeros((*rows, *np.shape(x))) for name, x in params.items() if name != "w"}
        return {"w": by_w, **zeros}, by_hparams


def primal(params: Any) -> Any:
    """Return w. Raise a ValueError if params is no dict with it."""
    if not isinstance(params, dict) or "w" not in params:
        raise ValueError(
            'params: expected a dict with "w" and the multipliers "equality" or "inequality", got '
            f"{f'the keys {sorted(params)}' if isinstance(params, dict) else type(params).__name__}. {WAY_OUT}"
        )
    return params["w"]


def _added(*trees: Any) -> Any:
    known = [tree for tree in trees if tree is not None]
    return tree_map(lambda *parts: sum(parts[1:], parts[0]), *known)


def _method(function: Any, role: str, method: str) -> Any:
    if not hasattr(function, method):
        raise TypeError(
            f"{role} ({getattr(function, '__name__', type(function).__name__)}) has no method {method!r}, which the "
            "numpy backend needs: see bilevel.problems.protocols.Constraint. The torch and jax backends derive it: "
            "pass torch or JAX arrays."
        )
    return getattr(function, method)
