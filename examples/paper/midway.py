"""Compare approximate inverse Hessians in the middle of a training, where the paper measures.

The Hessian of a network has negative eigenvalues there, so its inverse gives no descent direction. There are two other
yardsticks. One is the inverse of the Hessian plus a damping of twice the least eigenvalue. The other is the derivative
of the validation loss by the decays through all steps of the training (`bl.metagradient`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import bilevel as bl
import bilevel_torch
from regression import BACKEND, PROBLEM, Setting, begin, outer

RATE = 0.03  # of gradient descent
TERMS = (1, 5, 20)
NAMES = ["identity", *(f"Neumann {k}" for k in TERMS), "CG 5", "CG 20"]
NAMES += [f"damped {name}" for name in ("Neumann 5", "Neumann 20", "CG 5", "CG 20")]


def follow(folder: Path | None, sizes: dict[str, Any], seed: int, path: Path) -> dict[str, Any]:
    """Train a network, and return the cosines of all methods with both yardsticks at some of the steps."""
    del path  # seconds, not worth a checkpoint
    start = begin("network", folder, sizes["hidden"], seed)
    steps = sizes["at"][-1]
    training = training_of(start, sizes["at"])
    whole = bl.metagradient(training, start.params, start.log_decay, [start.train], steps=steps)
    rows, params = [], start.params
    for step in range(1, steps + 1):
        params = descend(free(params), start.log_decay, start.train)
        if step in sizes["at"]:
            run = {name: grad[len(rows)] for name, grad in whole.grad.items()}
            rows.append({"step": step} | compare(start._replace(params=free(params)), BACKEND.to_flat(run)))
    rows = [{key: float(f"{value:.4g}") for key, value in row.items()} for row in rows]
    return {"rows": rows, "result": {"weights": sum(leaf.numel() for leaf in params.values())}}


def training_of(start: Setting, at: list[int]) -> bl.Training:
    """Return a training whose outcomes are the validation losses after the steps of ``at``."""

    def validation(states: list[Any], log_decay: Any) -> torch.Tensor:
        return torch.stack([outer(params, log_decay, *start.validation) for params in states])

    return bl.Training(descend, validation, at=tuple(at))


def descend(params: Any, log_decay: Any, batch: Any) -> Any:
    """Return the params after a step of gradient descent."""
    loss = PROBLEM.inner(params, log_decay, *batch)
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=bilevel_torch.recording())
    return {name: leaf - RATE * grad for (name, leaf), grad in zip(params.items(), grads, strict=True)}


def free(params: Any) -> Any:
    """Return the params without the graph of the step that has made them."""
    return {name: leaf.detach().requires_grad_() for name, leaf in params.items()}


def compare(setting: Setting, run: np.ndarray) -> dict[str, float]:
    """Return the cosines of all methods with the damped exact hypergradient, and with the derivative of the run."""
    eigenvalues = np.linalg.eigvalsh(setting.linearize()[0])
    largest, damping = eigenvalues[-1], 2 * max(0.0, -eigenvalues[0])
    inverse, _ = setting.hypergradient({"name": "exact", "damping": damping})
    undamped, _ = setting.hypergradient("exact")
    row = {"least": eigenvalues[0], "largest": largest, "yardsticks": cosine(inverse, run)}
    row["undamped inverse, run"] = cosine(undamped, run)
    for name in NAMES:
        found, _ = setting.hypergradient(solver_of(name, largest, damping))
        row |= {f"{name}, inverse": cosine(found, inverse), f"{name}, run": cosine(found, run)}
    return row


def solver_of(name: str, largest: float, damping: float) -> bl.LinearSolver[Any]:
    """Return the solver of a name, for a Hessian with this largest eigenvalue."""
    if name == "identity":
        return bl.Identity()
    *damped, kind, number = name.split()
    damping = damping if damped else 0.0
    if kind == "CG":
        return bl.CG(maxiter=int(number), rtol=0.0, damping=damping)
    return bl.Neumann(terms=int(number), step_size=1 / (largest + damping), damping=damping)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the cosine between two vectors; 0 if x is zero, as CG without a step is."""
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), np.finfo(float).tiny))
