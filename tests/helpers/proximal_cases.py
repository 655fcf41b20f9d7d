"""Proximal and projected problems with quadratic objectives, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from frameworks import moved
from scipy import linalg

import bilevel as bl


class Quadratic:
    """½ ⟨w, A w⟩ − ⟨b + shift, w⟩, where shift is an entry of hparams. w has shape (n,) or (n, k)."""

    def __call__(self, w, h, A, b):
        return 0.5 * (w * (A @ w)).sum() - ((b + h["shift"]) * w).sum()

    def grad(self, w, h, A, b):
        return A @ w - b - h["shift"]

    def hvp(self, w, h, v, A, b):
        return A @ v

    def cross_vjp(self, w, h, v, A, b):
        return {key: -v if key == "shift" else np.zeros_like(x) for key, x in h.items()}


class Distance:
    """½ ‖w − target‖² + Σ shift²."""

    def __call__(self, w, h, target):
        return 0.5 * ((w - target) ** 2).sum() + (h["shift"] ** 2).sum()

    def grad(self, w, h, target):
        return w - target, {key: 2 * x if key == "shift" else np.zeros_like(x) for key, x in h.items()}


@dataclass
class Case:
    """A problem, its hyperparameters besides ``shift``, and the shape of params.

    The curvature of the smooth objective is from 0.5 to 4. The entries of w* are of about one.
    """

    kind: type
    operator: Any
    settings: dict[str, Any]
    shape: tuple[int, ...] = (8,)
    step_size: float = 0.7
    seed: int = 0
    data: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        q = linalg.qr(rng.standard_normal((self.shape[0],) * 2))[0]
        A = q @ np.diag(np.geomspace(0.5, 4.0, self.shape[0])) @ q.T
        b, target = 2 * rng.standard_normal(self.shape), rng.standard_normal(self.shape)
        self.data = {"inner_args": ((A + A.T) / 2, b), "outer_args": (target,)}
        self.hparams = {"shift": 0.3 * rng.standard_normal(self.shape)}
        self.hparams |= {key: np.asarray(x, np.float64) for key, x in self.settings.items()}
        self.problem = self.kind(Quadratic(), self.operator, Distance(), step_size=self.step_size)
        self.fit = bl.proximal_fit(self.problem, inner_args=self.data["inner_args"], gtol=1e-13)
        self.params = self.fit(self.hparams, np.zeros(self.shape))

    def arguments(self, backend: Any) -> dict[str, Any]:
        """Return the arguments of `bl.hypergradient` in a framework."""
        point = {"params": self.params, "hparams": self.hparams, **self.data}
        return {"problem": self.problem, **moved(backend, point)}

    @cached_property
    def slopes(self) -> dict[str, np.ndarray]:
        """dF/dλ by central differences of the solved problem."""
        h = {key: x.copy() for key, x in self.hparams.items()}
        return {
            key: np.array([self._slope(h, x, i) for i in np.ndindex(x.shape)]).reshape(x.shape) for key, x in h.items()
        }

    def _slope(self, h: dict[str, np.ndarray], x: np.ndarray, i: tuple[int, ...]) -> float:
        value, step, found = x[i].copy(), 1e-5, []
        for end in (value + step, value - step):
            x[i] = end
            found.append(float(self.problem.outer(self.fit(h, self.params), h, *self.data["outer_args"])))
        x[i] = value
        return (found[0] - found[1]) / (2 * step)
