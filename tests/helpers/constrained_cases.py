"""Constrained problems for tests, with one formula for all frameworks and analytic derivatives for NumPy."""

from __future__ import annotations

import numpy as np

import bilevel as bl

SIZE = 4


class Pull:
    """¼ Σ (w − center)⁴ + ½ ‖w‖². A nonlinear objective."""

    def __call__(self, w, h):
        return 0.25 * ((w - h["center"]) ** 4).sum() + 0.5 * (w**2).sum()

    def grad(self, w, h):
        return (w - h["center"]) ** 3 + w

    def hvp(self, w, h, v):
        return (3 * (w - h["center"]) ** 2 + 1) * v

    def cross_vjp(self, w, h, v):
        return {"center": -3 * (w - h["center"]) ** 2 * v, "radius": np.zeros(()), "sum": np.zeros(())}


class Total:
    """Σ w − sum, an equality."""

    def __call__(self, w, h):
        return (w.sum() - h["sum"]).reshape(1)

    def jvp_params(self, w, h, v):
        return v.sum().reshape(1)

    def vjp_params(self, w, h, m):
        return m * np.ones_like(w)

    def vjp_hparams(self, w, h, m):
        return {"center": np.zeros_like(w), "radius": np.zeros(()), "sum": -m.sum()}

    def hvp(self, w, h, m, v):
        return None

    def cross_vjp(self, w, h, m, v):
        return None


class InBalls:
    """radius Σ wᵢ² over even entries ≤ 1, and the same over odd entries. The radius multiplies, so ∂²g/∂λ∂w counts."""

    def __call__(self, w, h):
        return h["radius"] * (w.reshape(SIZE // 2, 2) ** 2).sum(0) - 1.0

    def jvp_params(self, w, h, v):
        return 2 * h["radius"] * (w * v).reshape(SIZE // 2, 2).sum(0)

    def vjp_params(self, w, h, m):
        return 2 * h["radius"] * w * np.tile(m, SIZE // 2)

    def vjp_hparams(self, w, h, m):
        squares = (w.reshape(SIZE // 2, 2) ** 2).sum(0)
        return {"center": np.zeros_like(w), "radius": np.asarray(m @ squares), "sum": np.zeros(())}

    def hvp(self, w, h, m, v):
        return 2 * h["radius"] * v * np.tile(m, SIZE // 2)

    def cross_vjp(self, w, h, m, v):
        by_radius = 2 * (w * v).reshape(SIZE // 2, 2).sum(0) @ m
        return {"center": np.zeros_like(w), "radius": np.asarray(by_radius), "sum": np.zeros(())}


class Distance:
    """½ Σ (w − 1)² + ½ sum²."""

    def __call__(self, w, h):
        return 0.5 * ((w - 1) ** 2).sum() + 0.5 * h["sum"] ** 2

    def grad(self, w, h):
        return w - 1, {key: x if key == "sum" else np.zeros_like(x) for key, x in h.items()}


class SquaredNorm:
    """½ ‖w‖²."""

    def __call__(self, w, h):
        return 0.5 * (w**2).sum()

    def grad(self, w, h):
        return w, None


def nonlinear(equality=True, inequality=True):
    """Return a problem whose first ball holds the solution, and whose second does not."""
    return bl.Constrained(Pull(), Distance(), Total() if equality else None, InBalls() if inequality else None)


def point():
    """Return the hyperparameters of `nonlinear`."""
    center = np.array([1.5, -0.4, 1.1, 0.3])
    return {"center": center, "radius": np.asarray(2.5), "sum": np.asarray(0.9)}


def program(keys=("Q", "q", "A", "b", "G", "h"), seed=0):
    """Return a quadratic program with two of three inequalities active, and its hyperparameters."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((SIZE, SIZE))
    data = {"Q": factor @ factor.T + np.eye(SIZE), "q": 3 * rng.standard_normal(SIZE)}
    data["A"], data["G"] = rng.standard_normal((1, SIZE)), rng.standard_normal((3, SIZE))
    data["b"], data["h"] = rng.standard_normal(1), np.array([0.0, 0.1, 8.0])
    problem = bl.problems.quadratic_program(SquaredNorm(), **data | {key: key for key in keys})
    return problem, {key: data[key] for key in keys}


def slopes(problem, fit, hparams, params, step=1e-5):
    """Return dF/dλ by central differences of the solved problem, in NumPy."""
    found = {}
    for key, x in hparams.items():
        found[key] = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            values = []
            for sign in (1, -1):
                moved = {**hparams, key: x.copy()}
                moved[key][i] += sign * step
                values.append(float(problem.outer(fit(moved, params), moved)))
            found[key][i] = (values[0] - values[1]) / (2 * step)
    return found
