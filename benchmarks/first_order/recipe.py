"""Change one setting of weights of examples at a time: the rate, how often, the batch, the size of the validation set.

The task is `cleaning`: half of the labels of 5,000 images are wrong, and each image has a weight. "again" trains a new
network for as many steps with the weights found, "without" only on the images whose weight is at least 1. Printed for
each setting: the medians over the seeds of the F1 score of the labels called wrong, and of the accuracies.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.recipe --data DIR [--net mlp] [--steps 500] [--seeds 5]
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bilevel as bl
import bilevel_torch
from benchmarks.first_order.cleaning import (
    ADAM,
    BATCH,
    DECAY,
    RATE,
    TRACKING,
    Data,
    accuracy,
    errors,
    f1_score,
    network,
    read,
)
from bilevel_torch.data import DataWeights

COLUMNS = ["F1", "validation", "test", "test again", "test without"]


@dataclass(frozen=True)
class Setting:
    """How the weights are learned."""

    method: str = "tracked"  # or sama, identity
    rate: float = 0.1  # of Adam, for the scores
    every: int = 1  # steps of training between two hypergradients
    outer_batch: int = BATCH
    held: int = 5000  # images for validation


def settings(method: str) -> dict[str, Setting]:
    """Return the base, and changes of it."""
    base = Setting(method)
    found = {"base": base}
    for name, values in {
        "method": ["identity", "sama", "tracked"],
        "rate": [0.01, 1.0],
        "every": [4, 16],
        "outer_batch": [50],
        "held": [50, 500],
    }.items():
        found |= {f"{name} {v}": changed for v in values if (changed := replace(base, **{name: v})) != base}
    return found


def train(net: nn.Module, of: Data, steps: int, seed: int, weights: Callable[[Tensor], Tensor], each: Any) -> None:
    """Train a network with Adam. After each step, call ``each(step, optimizer, inner)``."""
    linear = isinstance(net, nn.Linear)
    optimizer = torch.optim.Adam(net.parameters(), RATE if linear else ADAM)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.tensor(rng.choice(len(of.wrong), min(BATCH, len(of.wrong)), replace=False))

        def inner(rows: Tensor = rows) -> Tensor:
            decay = DECAY * sum(((p**2).sum() for p in net.parameters()), torch.zeros(()))
            # Half of the images are wrong, so the factor 1/2 keeps the decay as in `cleaning`.
            return (weights(rows) / 2 * errors(net, of.train, rows)).mean() + decay

        optimizer.zero_grad()
        inner().backward()
        optimizer.step()
        each(step, optimizer, inner)


def run(setting: Setting, net_name: str, of: Data, steps: int, seed: int) -> list[float]:
    """Return the numbers of COLUMNS."""
    torch.manual_seed(seed)
    held = (of.validation[0][: setting.held], of.validation[1][: setting.held])
    make = partial(network, net_name, of.train[0].shape[1])
    net, weights = make(), DataWeights(len(of.wrong), "sigmoid")
    outer_optimizer = torch.optim.Adam(weights.parameters(), setting.rate)
    rng, first_order = np.random.default_rng(1000 + seed), None

    def outer_step(step: int, optimizer: torch.optim.Optimizer, inner: Callable[[], Tensor]) -> None:
        nonlocal first_order
        if (step + 1) % setting.every:
            return
        first_order = first_order or bilevel_torch.FirstOrder(
            net,
            weights.parameters(),
            optimizer=partial(torch.optim.SGD, lr=TRACKING, weight_decay=1e-2) if setting.method == "tracked" else None,
            preconditioner=optimizer if setting.method == "sama" else None,
        )
        others = torch.tensor(rng.choice(len(held[1]), min(setting.outer_batch, len(held[1])), replace=False))
        outer = partial(lambda rows: errors(net, held, rows).mean(), others)
        first_order.backward(inner, outer, accumulate=False, on_failure="ignore")
        outer_optimizer.step()

    train(net, of, steps, seed, weights, outer_step)
    w = weights().detach()
    found = [f1_score(w < 1, of.wrong), accuracy(net, held), accuracy(net, of.test)]
    for fixed in (w, 2 * (w >= 1).float()):
        net = make()
        train(net, of, steps, seed, lambda rows, fixed=fixed: fixed[rows], lambda *_: None)
        found.append(accuracy(net, of.test))
    return found


def main(argv: list[str] | None = None) -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has mnist/; without it, small digits")
    parser.add_argument("--net", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--method", choices=["identity", "sama", "tracked"], default="tracked")
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bl.SolverWarning)
    data = [read(options.data, seed) for seed in range(options.seeds)]
    print(f"{options.net + ', ' + options.method:<20}" + "".join(f"{name:>14}" for name in COLUMNS), flush=True)
    for name, setting in settings(options.method).items():
        if options.only and name not in options.only:
            continue
        runs = [run(setting, options.net, of, options.steps, seed) for seed, of in enumerate(data)]
        print(f"{name:<20}" + "".join(f"{x:14.3f}" for x in np.median(runs, 0)), flush=True)


if __name__ == "__main__":
    main()
