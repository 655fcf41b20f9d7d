"""Cheap numbers at the end of a run that might tell how right its hypergradient is."""

import numpy as np

import bilevel as bl
from benchmarks.attribution.methods import auto_damping, lanczos, solve
from benchmarks.attribution.points import Point, Spectral


def measures(point: Point, at: Spectral, w: np.ndarray) -> dict[str, float]:
    """Return numbers by name, for the first objective. They have no units, or the units of F.

    Args:
        point: the derivatives at w.
        at: the same in the basis of the eigenvectors of the Hessian.
        w: the weights, of shape (n,).
    """
    norm = np.linalg.norm
    L, F, g, b, damping = point.value, point.outer_values[0], at.grad, at.rhs[0], auto_damping(at)
    (v,), (h,), _ = solve(at, bl.CG(damping=damping))
    (v_more,), (h_more,), _ = solve(at, bl.CG(damping=4 * damping))
    (step,), _, _ = solve(at._replace(rhs=g[None]), bl.CG(damping=damping))
    ritz, shares = lanczos(at.values, b)
    negative = max(-ritz[0], 0.0)
    found = {
        "‖∂L/∂w‖ / ‖∂F/∂w‖": norm(g) / norm(b),
        "‖∂L/∂w‖ ‖w‖ / L": norm(g) * norm(w) / L,
        "‖∂F/∂w‖ ‖w‖ / F": norm(b) * norm(w) / F,
        "‖∂F/∂w‖ ‖w‖": norm(b) * norm(w),
        "‖∂L/∂w‖ ‖w‖ F / L": norm(g) * norm(w) * F / L,
        "value_error / F": abs(g @ v) / F,
        "Newton decrement / L": g @ step / L,
        "‖damped Newton step‖ / ‖w‖": norm(step) / norm(w),
        "negative curvature · ‖w‖² / L": negative * norm(w) ** 2 / L,
        "negative over largest curvature": negative / ritz[-1],
        "negative share of the curvature along ∂F/∂w": -shares[ritz < 0] @ ritz[ritz < 0] / (shares @ np.abs(ritz)),
        "share of v·∂F/∂w that the damping decides": damping * (v @ v) / (v @ b),
        "cosine of v for δ and 4δ": _cosine(v, v_more),
        "cosine of hypergradients for δ and 4δ": _cosine(h, h_more),
        "cosine of hypergradients for δ and identity": _cosine(h, -(at.cross @ b)),
        "share of examples that the hypergradient reaches": np.abs(h).sum() ** 2 / (h @ h) / len(h),
    }
    return {name: float(value) for name, value in found.items()}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
