"""Compare approximate inverse Hessians by the hypergradients they give, on housing prices and on diabetes.

    python examples/paper/inversion.py --data DIR

Figures 3 and 4 of the paper: cosine and distance between the hypergradient of each method and the exact one, against
the number of Hessian-vector products, for a linear model and a tanh network with a weight decay for each weight. Here
at the optimum, in float64, and in the middle of a training (midway.py). The runs called raw leave the features as they
are, where a Neumann step of 0.001 diverges.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bilevel as bl
from bilevel.operators.linear_operator import LinearOperator
from midway import RATE, cosine, follow
from regression import GAUSS_NEWTON, prepare
from runs import options, show, stored, variants

FULL = {"products": 50, "hidden": 13}
FAST = {"products": 12, "hidden": 3}
MIDWAY = {"hidden": 13, "at": [10, 30, 100, 300, 1000, 3000]}  # after so many steps of a training
FAST_MIDWAY = {"hidden": 3, "at": [5, 20]}
STEP = 1e-3  # of Neumann in the published code


@dataclass(frozen=True)
class ClampedCG(bl.LinearSolver[None]):
    """CG of the published code, as we read it: from b itself, with 0.01 for denominators below 0.005."""

    maxiter: int = 20

    def init(self, A: LinearOperator[Any]) -> None:
        """Return nothing: there is no state."""

    def solve(self, state: None, A: LinearOperator[Any], b: Any, x0: Any) -> tuple[Any, bl.SolverInfo]:
        """Return v and how it was found."""
        space, x = A.space, b
        p = r = A.residual(b, x)
        for _ in range(self.maxiter):
            Ap, rr = A(p), space.dot(r, r)
            alpha = rr / clamped(space.dot(p, Ap), space.xp)
            x, r = space.axpy(alpha, p, x), space.axpy(-alpha, Ap, r)
            p = space.axpy(space.dot(r, r) / clamped(rr, space.xp), p, r)
        return x, bl.SolverInfo(self.maxiter, space.norm(r), space.norm(b), bl.Status.MAXITER)


def clamped(denominator: Any, xp: Any) -> Any:
    """Return a denominator, or 0.01 if it is below 0.005. ``xp`` is the namespace of scalars."""
    return xp.where(denominator < 5e-3, 1e-2, denominator)


def compare(
    kind: str, folder: Path | None, sizes: dict[str, int], seed: int, solver: Any, path: Path
) -> dict[str, Any]:
    """Return cosine and distance to the exact hypergradient, of each method by its products."""
    del path  # seconds, not worth a checkpoint
    setting = prepare(kind, folder, sizes["hidden"], seed)
    exact, _ = setting.hypergradient("exact")
    eigenvalues = np.linalg.eigvalsh(setting.linearize()[0])
    step = 1 / eigenvalues[-1]

    def quality(name: str, *call: Any) -> dict[str, float]:
        found, _ = setting.hypergradient(*call)
        return {f"{name} cosine": cosine(found, exact), f"{name} error": distance(found, exact)}

    if solver is not None:
        return {"result": quality("config", solver)}
    rows = [
        {"products": k}
        | quality("Neumann", bl.Neumann(terms=k, step_size=step))
        | quality("CG", bl.CG(maxiter=k, rtol=0.0, damping=0.0))
        | quality("Gauss-Newton CG", bl.CG(maxiter=k, rtol=0.0, damping=0.0), GAUSS_NEWTON)
        | quality("clamped CG", ClampedCG(k))
        | (quality("Nyström", bl.Nystrom(rank=k)) if k else {})
        for k in range(sizes["products"])
    ]
    result = {
        "weights": len(exact),
        "condition": float(eigenvalues[-1] / eigenvalues[0]),
        "least": float(eigenvalues[0]),
    }
    rows = [row | {key: float(f"{value:.4g}") for key, value in row.items() if key != "products"} for row in rows]
    return {"rows": rows, "result": result | quality("identity", bl.Identity(scale=step))}


def fail(folder: Path | None, seed: int, path: Path) -> dict[str, Any]:
    """Return what becomes of Neumann with a step that is too large, and of CG in float32, on raw features."""
    del path
    setting = prepare("raw", folder, 0, seed)
    exact, _ = setting.hypergradient("exact")
    hessian, rhs, hypergradient_of = setting.linearize()
    eigenvalues = np.linalg.eigvalsh(hessian)
    result: dict[str, Any] = {"condition": float(eigenvalues[-1] / eigenvalues[0])}
    term = total = rhs
    for k in range(1, 21):  # algorithm 3 as it stands: nothing looks at the terms
        term = term - STEP * hessian @ term
        total = total + term
        if k in (5, 20):
            result[f"unguarded {k} error"] = distance(hypergradient_of(STEP * total), exact)
    diagonal = bl.DiagonalPreconditioner()
    for name, solver, dtype in (
        ("fixed step", bl.Neumann(terms=20, step_size=STEP), torch.float64),
        ("automatic step", bl.Neumann(terms=20), torch.float64),
        ("float32 CG", bl.CG(maxiter=500, rtol=1e-5, damping=0.0), torch.float32),
        ("preconditioned CG", bl.CG(maxiter=500, rtol=1e-5, damping=0.0, preconditioner=diagonal), torch.float32),
        ("float64 CG", bl.CG(maxiter=500, rtol=1e-5, damping=0.0), torch.float64),
    ):
        found, info = setting.hypergradient(solver, dtype=dtype)
        result[f"{name} status"] = info.status.name
        result[f"{name} residual"] = info.residual_norm / info.rhs_norm
        result[f"{name} error"] = distance(found, exact)
    return {"result": result}


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return norm(x - y) / norm(y)."""
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run all variants, print what came out, and return their histories."""
    arguments = options(__doc__, argv)
    sizes = FAST if arguments.fast else FULL
    folders = {"diabetes": None} if arguments.data is None else {"boston": arguments.data, "diabetes": None}
    names = [f"{kind}-{data}" for data in folders for kind in ("linear", "network", "raw", "midway")]
    histories = {}
    for name, solver in variants(arguments, dict.fromkeys(names)).items():
        kind, _, data = ("network-diabetes" if name == "config" else name).partition("-")
        for seed in arguments.seeds:
            settings = {**sizes, "seed": seed, "solver": solver}
            if kind == "midway":
                of = FAST_MIDWAY if arguments.fast else MIDWAY
                settings = {**of, "rate": RATE, "seed": seed}
                run = partial(follow, folders[data], of, seed)
            elif kind == "raw":
                run = partial(fail, folders[data], seed)
            else:
                run = partial(compare, kind, folders[data], sizes, seed, solver)
            histories[f"{name}-{seed}"] = stored(arguments, "inversion", f"{name}-{seed}", settings, run)
    show(histories)
    return histories


if __name__ == "__main__":
    main()
