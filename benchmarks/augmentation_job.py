"""The magnitudes of a random affine augmentation, learned while a small network trains: damping "auto" and fixed ones.

Six log magnitudes (rotation, two translations, scale, two shears) start at 0.018. A convnet (28,938 weights) trains on
100 images of MNIST by 1,200 steps of Adam. Every five steps, a hypergradient of the loss of 250 validation images
changes the magnitudes. CG takes at most 10 products per solve. The printed numbers are the test accuracies of each
seed, with their mean. "none" has the magnitudes of the start. Run it as

    OMP_NUM_THREADS=1 python benchmarks/augmentation_job.py --data DIR [--seeds 5] [--dampings auto 0.1 1]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import bilevel as bl

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))
import data
from models import small_cnn

DAMPINGS = ["none", "auto", "0.03", "0.1", "0.3", "1", "3", "10"]
START, MAGNITUDES = 0.018, 6
TRAIN, VALIDATION, BATCH, BATCH_VAL = 100, 1000, 50, 250
EVERY, LR, DECAY, LR_OUTER = 5, 1e-3, 5e-4, 0.05


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    accuracy: float  # of the test images, in per cent
    magnitudes: list[float]
    dampings: list[float]
    seconds: float  # of CPU time


def main(argv: list[str] | None = None) -> None:
    """Print a line for each damping."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has mnist/; without it, small digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--dampings", nargs="+", default=DAMPINGS)
    options = parser.parse_args(argv)
    split = data.mnist(options.data)
    for damping in options.dampings:
        runs = [run(split, damping, seed, options.steps) for seed in range(options.seeds)]
        found = [outcome.accuracy for outcome in runs]
        used = [x for outcome in runs for x in outcome.dampings]
        line = f"{damping:>5}: {np.mean(found):.1f} % right ({', '.join(f'{a:.1f}' for a in found)})"
        line += f", magnitudes {np.mean([outcome.magnitudes for outcome in runs], 0).round(3).tolist()}"
        if damping == "auto":
            line += f", median damping {np.median(used):.2g}"
        print(f"{line}, {np.mean([outcome.seconds for outcome in runs]):.0f} s", flush=True)


def augment(x: Tensor, logs: Tensor, noise: Tensor) -> Tensor:
    """Return images of shape (n, c, h, w), each moved by its row of the noise, of shape (n, 6)."""
    turn, right, down, larger, shear_x, shear_y = (logs.exp() * noise).T
    cosine, sine, size = turn.cos(), turn.sin(), larger.exp()
    first = torch.stack([size * cosine, shear_x - sine, right], 1)
    second = torch.stack([shear_y + sine, size * cosine, down], 1)
    grid = affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False)


def run(split: data.Split, damping: str, seed: int, steps: int) -> Outcome:
    """Train a network, and the magnitudes unless the damping is "none"."""
    torch.manual_seed(seed)
    x, y = torch.as_tensor(split.train.x), torch.as_tensor(split.train.y)
    order = torch.randperm(len(y))
    train, val = order[:TRAIN], order[TRAIN : TRAIN + VALIDATION]
    model = small_cnn(*x.shape[1:3])
    weights, logs = dict(model.named_parameters()), torch.full((MAGNITUDES,), START).log().requires_grad_()

    def inner(weights: dict[str, Tensor], logs: Tensor, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        logits = functional_call(model, weights, (augment(x, logs, noise),))
        return cross_entropy(logits, y) + DECAY / 2 * sum((w**2).sum() for w in weights.values())

    def outer(weights: dict[str, Tensor], logs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x,)), y)

    problem = bl.Problem(inner, outer)
    solver: dict[str, Any] = {"name": "cg", "maxiter": 10, "damping": "auto" if damping == "auto" else 0.0}
    if damping not in ("auto", "none"):
        solver["damping"] = float(damping)
    optimizer, outer_optimizer = torch.optim.Adam(weights.values(), LR), torch.optim.Adam([logs], LR_OUTER)
    used, start = [], process_time()
    for step in range(steps):
        chosen = train[torch.randperm(TRAIN)[:BATCH]]
        batch = x[chosen], y[chosen], torch.randn(BATCH, MAGNITUDES)
        optimizer.zero_grad()
        inner(weights, logs.detach(), *batch).backward()
        optimizer.step()
        if damping != "none" and step % EVERY == EVERY - 1:
            chosen = val[torch.randperm(len(val))[:BATCH_VAL]]
            data_val = x[chosen], y[chosen]
            hg = bl.hypergradient(
                problem, weights, logs, inner_args=batch, outer_args=data_val, solver=solver, on_failure="ignore"
            )
            logs.grad = hg.grad
            outer_optimizer.step()
            used.append(hg.info.damping)
    seconds = process_time() - start
    with torch.no_grad():
        x_test, y_test = torch.as_tensor(split.test.x), torch.as_tensor(split.test.y)
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return Outcome(100 * accuracy, logs.detach().exp().tolist(), used, seconds)


if __name__ == "__main__":
    main()
