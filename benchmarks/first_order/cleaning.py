"""Find wrong labels of MNIST, by a weight for each training image, for equal numbers of gradients.

5,000 images to train on, half of them with a wrong label, 5,000 for validation, 10,000 for tests. The loss of an image
is weighted by a sigmoid. Each step takes one step of Adam on a mini-batch, and one step of Adam on the arguments of the
sigmoids along a hypergradient of the same mini-batch. One gradient, product or difference of one side counts as one
gradient (a product of CG as two), of a mini-batch each. "f2sa" tracks the minimum of L + F / σ next to the weights
(Kwon et al., ICML 2023). Printed for each method: the median over the seeds of the test accuracy, of the F1 score of
the labels called wrong (sigmoid below 1/2), and of the CPU seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.cleaning --data DIR [--net mlp] [--gradients 4000] [--seeds 5]
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
import data

TRAIN, BATCH, DECAY, SIGMA = 5000, 500, 1e-3, 100.0
RATE, ADAM, TRACKING, OUTER_RATE = 1e-2, 1e-3, 0.1, 0.1
CG_STEPS = 3
COSTS = {"none": 1, "identity": 4, "sama": 4, "tracked": 4, "f2sa": 3, "cg": 4 + 2 * CG_STEPS}


@dataclass(frozen=True)
class Data:
    """Images as rows, and labels."""

    train: tuple[Tensor, Tensor]
    wrong: Tensor  # whether each label of train is wrong
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read(folder: Path | None, seed: int) -> Data:
    """Split the images, and replace half of the labels by another class."""
    split, rng = data.mnist(folder), np.random.default_rng(seed)
    x, y = split.train.x.reshape(len(split.train.x), -1), split.train.y
    order = rng.permutation(len(y))
    half = min(TRAIN, len(y) // 2)
    mine, others = order[:half], order[half : 2 * half]
    wrong = rng.permutation(half) < half // 2
    labels = np.where(wrong, (y[mine] + rng.integers(1, 10, half)) % 10, y[mine])
    test = split.test.x.reshape(len(split.test.x), -1), split.test.y
    pairs = ((x[mine], labels), (x[others], y[others]), test)
    train, validation, held = ((torch.tensor(a), torch.tensor(b)) for a, b in pairs)
    return Data(train, torch.tensor(wrong), validation, held)


def network(name: str, pixels: int) -> nn.Module:
    """Return a linear model or a perceptron."""
    if name == "linear":
        return nn.Linear(pixels, 10)
    return nn.Sequential(nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 10))


class F2SA:
    """The fully first-order method with one auxiliary network, by hand."""

    def __init__(self, net: nn.Module, make: Callable[[], nn.Module], scores: Tensor) -> None:
        self.net, self.other, self.scores = net, make(), scores
        self.other.load_state_dict(net.state_dict())
        self.optimizer = torch.optim.Adam(self.other.parameters(), RATE)

    def step(self, inner: Callable[[nn.Module], Tensor], outer: Callable[[nn.Module], Tensor], at_net: Tensor) -> None:
        """Move the auxiliary network, and set the gradient of the scores. ``at_net`` is ∂L/∂λ at the weights."""
        self.optimizer.zero_grad()
        (inner(self.other) + outer(self.other) / SIGMA).backward()
        self.optimizer.step()
        assert self.scores.grad is not None
        self.scores.grad = SIGMA * (self.scores.grad - at_net)


def run(method: str, net_name: str, of: Data, gradients: int, seed: int) -> tuple[float, float, float]:
    """Return the test accuracy, the F1 score and CPU seconds."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    make = partial(network, net_name, of.train[0].shape[1])
    net = make()
    scores = torch.zeros(len(of.wrong), requires_grad=True)
    rate = RATE if net_name == "linear" else ADAM
    optimizer, outer_optimizer = torch.optim.Adam(net.parameters(), rate), torch.optim.Adam([scores], OUTER_RATE)
    tracking = partial(torch.optim.SGD, lr=TRACKING, weight_decay=1e-2)
    first_order = bilevel_torch.FirstOrder(
        net,
        scores,
        optimizer=tracking if method == "tracked" else None,
        preconditioner=optimizer if method == "sama" else None,
    )
    f2sa = F2SA(net, make, scores)
    solver = bl.WarmStart({"name": "cg", "maxiter": CG_STEPS, "rtol": None, "damping": 1e-2})
    batch = min(BATCH, len(of.wrong))
    began = time.process_time()
    for _ in range(gradients // COSTS[method]):
        rows, others = (torch.tensor(rng.choice(len(of.wrong), batch, replace=False)) for _ in range(2))

        def inner(net: nn.Module = net, rows: Tensor = rows) -> Tensor:
            decay = DECAY * sum(((p**2).sum() for p in net.parameters()), torch.zeros(()))
            return (scores[rows].sigmoid() * errors(net, of.train, rows)).mean() + decay

        def outer(net: nn.Module = net, rows: Tensor = others) -> Tensor:
            return errors(net, of.validation, rows).mean()

        optimizer.zero_grad()
        outer_optimizer.zero_grad()
        inner().backward()
        assert scores.grad is not None
        at_net = scores.grad.clone()
        if method == "f2sa":
            scores.grad = None
            f2sa.step(inner, outer, at_net)
        optimizer.step()
        if method == "none":
            continue
        if method == "cg":
            bilevel_torch.backward(inner(), outer(), net.parameters(), scores, solver=solver, accumulate=False)
        elif method != "f2sa":
            first_order.backward(inner, outer, accumulate=False, on_failure="ignore")
        outer_optimizer.step()
    seconds = time.process_time() - began
    return accuracy(net, of.test), f1_score(scores.detach() < 0, of.wrong), seconds


@torch.no_grad()
def accuracy(net: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    """Return the part of images that are classified right."""
    return float((net(pair[0]).argmax(1) == pair[1]).double().mean())


def f1_score(called: Tensor, wrong: Tensor) -> float:
    """Return the F1 score of the labels called wrong."""
    return 2 * float((called & wrong).sum()) / max(float(called.sum() + wrong.sum()), 1.0)


def errors(net: Any, pair: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Return the loss of each image."""
    return cross_entropy(net(pair[0][rows]), pair[1][rows], reduction="none")


def main(argv: list[str] | None = None) -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has mnist/; without it, small digits")
    parser.add_argument("--net", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--methods", nargs="+", default=list(COSTS), choices=list(COSTS))
    parser.add_argument("--gradients", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bl.SolverWarning)
    for method in options.methods:
        runs = [
            run(method, options.net, read(options.data, seed), options.gradients, seed) for seed in range(options.seeds)
        ]
        accuracy, f1, seconds = np.median(runs, 0)
        print(f"{options.net} {method:>13}: accuracy {accuracy:.3f}, F1 {f1:.3f}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
