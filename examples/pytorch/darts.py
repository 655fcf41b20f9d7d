"""DARTS: choose the operations of a network while its weights train. Compare it with random search.

    python examples/pytorch/darts.py [--fast] [--data DIR]

Each edge is a mixture of operations, weighted by a softmax of its scores. The weights of the network minimize the loss
on one half of the images, and the scores minimize the loss on the other half (Liu, Simonyan & Yang, ICLR 2019). The
best operation of each edge then makes a network, which is trained from new weights on both halves.

- "direct" ignores that the weights depend on the scores. The paper calls it first order.
- "first order" adds this dependence by differences of gradients, with `bilevel_torch.FirstOrder`. The paper calls it
  second order.
- "random" is the mean of four random networks. "random search" trains random networks on the first half for as much
  CPU time as "first order" searches, and keeps the best on the second half.

The table has means over seeds of the test accuracy, their standard errors, and CPU seconds of the search. ``--data``
names a folder that has mnist/. Without it, the images are scikit-learn's digits.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel_torch

sys.path.append(str(Path(__file__).parents[1] / "paper"))
import data

CHANNELS, HALF, BATCH, EVERY = 8, 200, 50, 4
RATE, SCORE_RATE = 1e-2, 0.1  # of Adam
EDGES = [(0, 1), (0, 2), (1, 2)]  # from node to node
Pair = tuple[Tensor, Tensor]


def operations() -> nn.ModuleDict:
    """Return what an edge may be."""
    blur, maximum = nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
    depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    every = {
        "skip": nn.Identity(),
        "blur": blur,
        "maximum": maximum,
        "depthwise": depthwise,
        "convolution": convolution,
    }
    return nn.ModuleDict({name: nn.Sequential(nn.ReLU(), operation) for name, operation in every.items()})


NAMES = list(operations())


class Mixture(nn.Module):
    """All operations of an edge, weighted by a softmax of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = operations()

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        parts = [
            share * operation(x) for share, operation in zip(scores.softmax(0), self.operations.values(), strict=True)
        ]
        return torch.stack(parts).sum(0)


class Network(nn.Module):
    """A convolution, three nodes, and a linear layer. ``choice`` has a name for each edge. None: mixtures."""

    def __init__(self, choice: list[str] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.edges = nn.ModuleList([operations()[name] for name in choice] if choice else [Mixture() for _ in EDGES])
        self.head = nn.Linear(3 * CHANNELS * 4, 10)

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        nodes = [self.stem(x), 0, 0]
        for number, ((start, end), edge) in enumerate(zip(EDGES, self.edges, strict=True)):
            nodes[end] = nodes[end] + (edge(nodes[start]) if scores is None else edge(nodes[start], scores[number]))
        return self.head(torch.cat([nn.functional.adaptive_avg_pool2d(node.relu(), 2).flatten(1) for node in nodes], 1))


def loss(net: nn.Module, batch: Pair, *scores: Tensor) -> Tensor:
    """Return the loss of a network on a batch. Mixtures need scores."""
    return cross_entropy(net(batch[0], *scores), batch[1])


def draw(pair: Pair, generator: torch.Generator) -> Pair:
    """Return a random batch."""
    rows = torch.randint(len(pair[1]), (BATCH,), generator=generator)
    return pair[0][rows], pair[1][rows]


def search(method: str, first: Pair, second: Pair, steps: int, seed: int) -> list[str]:
    """Return the operation of each edge with the best score."""
    net, generator = Network(), torch.Generator().manual_seed(seed)
    scores = torch.zeros(len(EDGES), len(NAMES), requires_grad=True)
    optimizer, outer_optimizer = torch.optim.Adam(net.parameters(), RATE), torch.optim.Adam([scores], SCORE_RATE)
    first_order = bilevel_torch.FirstOrder(net, scores, preconditioner=optimizer)
    for step in range(steps):
        batch, held = draw(first, generator), draw(second, generator)
        optimizer.zero_grad()
        loss(net, batch, scores).backward()
        optimizer.step()
        if step % EVERY == EVERY - 1:
            if method == "first order":
                first_order.backward(
                    partial(loss, net, batch, scores), partial(loss, net, held, scores), accumulate=False
                )
            else:
                (scores.grad,) = torch.autograd.grad(loss(net, held, scores), scores)
            outer_optimizer.step()
    return [NAMES[i] for i in scores.argmax(1)]


def random_choice(generator: torch.Generator) -> list[str]:
    """Return an operation for each edge."""
    return [NAMES[i] for i in torch.randint(len(NAMES), (len(EDGES),), generator=generator)]


def random_search(first: Pair, second: Pair, steps: int, seed: int, seconds: float) -> list[str]:
    """Return the best of some random networks, by the loss on the second half."""
    generator, found, began = torch.Generator().manual_seed(seed), [], time.process_time()
    while not found or time.process_time() - began < seconds:
        choice = random_choice(generator)
        found.append((float(loss(train(choice, first, steps, seed), second)), choice))
    return min(found)[1]


def train(choice: list[str], pair: Pair, steps: int, seed: int) -> nn.Module:
    """Return a trained network with one operation for each edge."""
    torch.manual_seed(seed)
    net, generator = Network(choice), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, draw(pair, generator)).backward()
        optimizer.step()
    return net.requires_grad_(False)


def read(folder: Path | None, seed: int) -> tuple[Pair, Pair, Pair]:
    """Return two halves of the training images, and test images."""
    split, rng = data.mnist(folder), np.random.default_rng(seed)
    order = rng.permutation(len(split.train.y))[: 2 * HALF]
    parts = [(split.train.x[rows], split.train.y[rows]) for rows in np.split(order, 2)]
    first, second, test = ((torch.tensor(x), torch.tensor(y)) for x, y in [*parts, (split.test.x, split.test.y)])
    return first, second, (test[0][:2000], test[1][:2000])


def run(folder: Path | None, steps: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return the test accuracy and CPU seconds of each method."""
    first, second, test = read(folder, seed)
    both = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def accuracy(choice: list[str]) -> float:
        return float((train(choice, both, steps, seed)(test[0]).argmax(1) == test[1]).double().mean())

    generator, found, seconds = torch.Generator().manual_seed(seed), {}, 0.0
    found["random"] = float(np.mean([accuracy(random_choice(generator)) for _ in range(4)])), 0.0
    for method in ("direct", "first order", "random search"):
        torch.manual_seed(seed)
        began = time.process_time()
        if method == "random search":
            choice = random_search(first, second, steps, seed, seconds)
        else:
            choice = search(method, first, second, steps, seed)
        seconds = time.process_time() - began
        found[method] = accuracy(choice), seconds
        print(f"seed {seed}, {method}: {', '.join(choice)}", flush=True)
    return found


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print a line for each method, and return the means."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder that has mnist/")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="100 steps and one seed")
    arguments = parser.parse_args(argv)
    steps, seeds = (100, 1) if arguments.fast else (arguments.steps, arguments.seeds)
    torch.set_num_threads(1)
    runs = [run(arguments.data, steps, seed) for seed in range(seeds)]
    means = {}
    for method in runs[0]:
        table = np.array([found[method] for found in runs])
        means[method] = table.mean(0).tolist()
        error = f" ± {table[:, 0].std(ddof=1) / np.sqrt(seeds):.3f}" if seeds > 1 else ""
        print(f"{method:<14}{means[method][0]:8.3f}{error}{means[method][1]:8.1f} s")
    return means


if __name__ == "__main__":
    main()
