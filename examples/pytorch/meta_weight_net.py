"""Learn how much to trust a training example from its loss: a Meta-Weight-Net, by three kinds of hypergradients.

    python examples/pytorch/meta_weight_net.py [--fast] [--data DIR]

Two fifths of the training labels are wrong. A small network maps the loss of an example to its weight, and clean images
tune this network (Shu et al., NeurIPS 2019). The hypergradient comes before each training step:

- "one step" differentiates the next training step, as the paper does, by `bilevel_torch.TrainingStep`.
- "first order" needs gradients only, by `bilevel_torch.FirstOrder`.
- "cg" solves with the Hessian of the batch, by `bilevel_torch.backward`.

The gradient of the weighted loss includes the derivative of the weights by the losses. With ``--detach``, the weights
are constants of a training step, as in the paper. The differences of "first order" see through ``detach()``. The
features are losses up to 4.6. Without this bound, the losses of wrong labels grow, and some runs fail.

The table has means over seeds and their standard errors: the test accuracy, the mean weights of right and wrong
labels, and CPU seconds. ``--data`` names a folder that has mnist/. Without it, the images are scikit-learn's digits.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
from bilevel_torch.data import DataWeights

sys.path.append(str(Path(__file__).parents[1] / "paper"))
import data

TRAIN, CLEAN, WRONG, BATCH = 5000, 500, 0.4, 100
RATE, OUTER_RATE = 0.05, 1e-3
LARGEST = 4.6  # of the features: twice the loss of a guess
SOLVER = bl.CG(maxiter=3, rtol=None, damping=10.0)  # with a damping of 1, solves meet negative curvature
Pair = tuple[Tensor, Tensor]


def read(folder: Path | None, seed: int) -> tuple[Pair, Tensor, Pair, Pair]:
    """Return noisy training images, whether each of their labels is wrong, clean images, and test images."""
    split, rng = data.mnist(folder), np.random.default_rng(seed)
    x, y = split.train.x.reshape(len(split.train.x), -1), split.train.y
    train, clean = np.split(rng.permutation(len(y))[: TRAIN + CLEAN], [min(TRAIN, len(y) // 2)])
    wrong = rng.random(len(train)) < WRONG
    labels = np.where(wrong, (y[train] + rng.integers(1, 10, len(train))) % 10, y[train])
    test = split.test.x.reshape(len(split.test.x), -1), split.test.y
    pairs = ((x[train], labels), (x[clean], y[clean]), test)
    noisy, held, test = ((torch.tensor(a), torch.tensor(b)) for a, b in pairs)
    return noisy, torch.tensor(wrong), held, test


class Loop:
    """The networks, and one way to differentiate."""

    def __init__(self, method: str, pixels: int, detach: bool = False) -> None:
        self.detach = detach
        self.net = nn.Sequential(nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, 10))
        self.optimizer = torch.optim.SGD(self.net.parameters(), RATE, momentum=0.9)
        scores = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1))
        nn.init.zeros_(scores[2].weight)  # all weights are 1 at first
        nn.init.zeros_(scores[2].bias)
        self.weights = DataWeights(scores)  # a softmax over the batch: the mean weight is 1
        self.outer_optimizer = torch.optim.Adam(self.weights.parameters(), OUTER_RATE)
        self.step = bilevel_torch.TrainingStep(self.net, self.optimizer, self.weighted)
        self.first_order = bilevel_torch.FirstOrder(self.net, self.weights.parameters())
        self.solver: object = SOLVER
        self.hypergradient: Callable[[Pair, Pair], object] | None = {
            "equal weights": None,
            "one step": self.one_step,
            "first order": self.by_gradients,
            "cg": self.by_cg,
        }[method]

    def weighted(self, net: nn.Module, hparams: dict[str, Tensor], batch: Pair) -> Tensor:
        losses = cross_entropy(net(batch[0]), batch[1], reduction="none")
        features = (losses.detach() if self.detach else losses).clamp(max=LARGEST)
        return (functional_call(self.weights, hparams, (features[:, None],)) * losses).mean()

    def inner(self, batch: Pair) -> Tensor:
        return self.weighted(self.net, dict(self.weights.named_parameters()), batch)

    def outer(self, batch: Pair) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def one_step(self, batch: Pair, clean: Pair) -> None:
        state = self.step(self.step.init(), dict(self.weights.named_parameters()), batch)
        self.outer_optimizer.zero_grad()
        self.step.evaluate(state, lambda net: cross_entropy(net(clean[0]), clean[1])).backward()

    def by_gradients(self, batch: Pair, clean: Pair) -> None:
        self.first_order.backward(lambda: self.inner(batch), lambda: self.outer(clean), accumulate=False)

    def by_cg(self, batch: Pair, clean: Pair) -> None:
        losses, parameters = (self.inner(batch), self.outer(clean)), (self.net.parameters(), self.weights.parameters())
        bilevel_torch.backward(*losses, *parameters, solver=self.solver, accumulate=False, on_failure="ignore")

    def train(self, noisy: Pair, held: Pair, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows, others = (torch.randint(len(y), (BATCH,), generator=generator) for _, y in (noisy, held))
            batch, clean = (noisy[0][rows], noisy[1][rows]), (held[0][others], held[1][others])
            if self.hypergradient:
                self.hypergradient(batch, clean)
                self.outer_optimizer.step()
            self.optimizer.zero_grad()
            self.inner(batch).backward()
            self.optimizer.step()


def run(method: str, folder: Path | None, steps: int, seed: int, detach: bool = False) -> list[float]:
    """Return the test accuracy, the mean weights of right and wrong labels, and CPU seconds."""
    noisy, wrong, held, test = read(folder, seed)
    torch.manual_seed(seed)
    loop = Loop(method, noisy[0].shape[1], detach)
    began = time.process_time()
    loop.train(noisy, held, steps, seed)
    seconds = time.process_time() - began
    with torch.no_grad():
        accuracy = (loop.net(test[0]).argmax(1) == test[1]).double().mean()
        w = loop.weights(cross_entropy(loop.net(noisy[0]), noisy[1], reduction="none").clamp(max=LARGEST)[:, None])
    return [float(accuracy), float(w[~wrong].mean()), float(w[wrong].mean()), seconds]


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print a line for each method, and return the means."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder that has mnist/")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--detach", action="store_true", help="weights as constants of the training step")
    parser.add_argument("--fast", action="store_true", help="300 steps and one seed")
    arguments = parser.parse_args(argv)
    steps, seeds = (300, 1) if arguments.fast else (arguments.steps, arguments.seeds)
    torch.set_num_threads(1)
    means = {}
    print(f"{'':<14}{'accuracy':>16}{'right':>16}{'wrong':>16}{'CPU seconds':>16}")
    for method in ("equal weights", "one step", "first order", "cg"):
        runs = np.array([run(method, arguments.data, steps, seed, arguments.detach) for seed in range(seeds)])
        means[method] = runs.mean(0).tolist()
        cells = [f"{mean:.3f}" for mean in means[method]]
        if seeds > 1:
            errors = runs.std(0, ddof=1) / np.sqrt(seeds)
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        print(f"{method:<14}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    return means


if __name__ == "__main__":
    main()
