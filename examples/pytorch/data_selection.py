"""Find the training examples that harm, by one metagradient, and train again without them.

    python examples/pytorch/data_selection.py [--data DIR] [--figure FILE.png]

Each training example has a weight of 1. The outer objective returns the losses of Q test images, and one call of
`bl.metagradient` returns the derivative of each loss by each weight: the scores (Ilyas & Engstrom, "MAGIC", arXiv
2504.16430). A positive score means that the example harms the query. Three tenths of the training labels are
wrong.

The first table has the linear datamodeling score (LDS): the rank correlation of predicted and actual losses over
trainings without a random 5 % of the examples (Park et al., "TRAK", ICML 2023). The second table has the accuracy on
other test images after training without the examples of the largest sums of scores. Both compare metagradients with
products of gradients at the last weights, and the second with random examples.

The images are MNIST's with --data, in the folder of `examples/paper/data.py`, and scikit-learn's digits otherwise.
"""

import argparse
import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch

WRONG, QUERIES, BATCH, EPOCHS, RATE = 0.3, 200, 40, 30, 0.03
LEFT_OUT, PARTS = 0.05, (0.0, 0.1, 0.2, 0.3, 0.4)  # of the training examples
Images = tuple[torch.Tensor, torch.Tensor]


class Data(NamedTuple):
    """Images of shape (n, pixels) from 0 to 1 with labels, and the training examples that are labelled wrong."""

    train: Images
    queries: Images
    test: Images
    wrong: torch.Tensor


def read(folder: Path | None, examples: int) -> Data:
    """Return the data."""
    if folder is None:
        from sklearn.datasets import load_digits

        pixels, numbers = load_digits(return_X_y=True)
        x, y = torch.as_tensor(pixels / 16, dtype=torch.float32), torch.as_tensor(numbers)
    else:
        raw = []
        for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
            with gzip.open(folder / "mnist" / name) as file:
                raw.append(torch.as_tensor(np.frombuffer(file.read(), np.uint8, offset=header).copy()))
        # The means of 2 x 2 pixels. With more pixels, this learning rate would make a rough run.
        x, y = raw[0].reshape(-1, 14, 2, 14, 2).float().mean((2, 4)).flatten(1) / 255, raw[1].long()
    generator = torch.Generator().manual_seed(0)
    parts = torch.randperm(len(y), generator=generator).split((examples, QUERIES, len(y) - examples - QUERIES))
    train, queries, test = ((x[rows], y[rows]) for rows in parts)
    wrong = torch.rand(examples, generator=generator) < WRONG
    other = (train[1] + torch.randint(1, 10, (examples,), generator=generator)) % 10
    return Data((train[0], torch.where(wrong, other, train[1])), queries, test, wrong)


class Run:
    """A training run as a function of the weights of its examples."""

    def __init__(self, data: Data, seed: int) -> None:
        torch.manual_seed(seed)
        (x, y), self.data = data.train, data
        self.net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.SGD(self.net.parameters(), RATE, momentum=0.9)
        orders = [torch.randperm(len(y)).split(BATCH) for _ in range(EPOCHS)]
        self.batches = [(x[rows], y[rows], rows) for order in orders for rows in order]
        self.step = bilevel_torch.TrainingStep(self.net, optimizer, self.loss)
        self.first, self.ones = self.step.init(), torch.ones(len(y))

    @staticmethod
    def loss(net: Any, weights: torch.Tensor, batch: Any) -> torch.Tensor:
        x, y, rows = batch
        return (weights[rows] * cross_entropy(net(x), y, reduction="none")).mean()

    def each(self, state: Any, weights: torch.Tensor) -> torch.Tensor:
        """Return the losses of the queries, of shape (Q,)."""
        x, y = self.data.queries
        return self.step.evaluate(state, lambda net: cross_entropy(net(x), y, reduction="none"))

    @torch.no_grad()
    def train(self, weights: torch.Tensor) -> Any:
        state = self.first
        for batch in self.batches:
            state = self.step(state, weights, batch)
        return state

    def accuracy(self, state: Any) -> float:
        x, y = self.data.test
        return float((self.step.evaluate(state, lambda net: net(x)).argmax(1) == y).float().mean())

    def metagradients(self) -> torch.Tensor:
        """Return a score for each query and each training example, of shape (Q, n)."""
        return bl.metagradient(bl.Training(self.step, self.each), self.first, self.ones, self.batches).grad

    def products(self) -> torch.Tensor:
        """Return minus the products of gradients of queries and examples, as by the solver "identity"."""

        def inner(params: Any, weights: torch.Tensor) -> torch.Tensor:
            x, y = self.data.train
            return (weights * cross_entropy(functional_call(self.net, params, (x,)), y, reduction="none")).mean()

        def outer(params: Any, weights: torch.Tensor) -> torch.Tensor:
            x, y = self.data.queries
            return cross_entropy(functional_call(self.net, params, (x,)), y, reduction="none")

        params = self.train(self.ones).params
        return bl.hypergradients(bl.Problem(inner, outer), params, self.ones, solver="identity").grad


def datamodeling_score(run: Run, scores: dict[str, torch.Tensor], trainings: int) -> dict[str, float]:
    """Return the mean over queries of the rank correlation between predicted and actual losses."""
    n = len(run.ones)
    weights = torch.ones(trainings, n)
    for row in weights:
        row[torch.randperm(n)[: int(LEFT_OUT * n)]] = 0
    actual = torch.stack([run.each(run.train(row), row).detach() for row in weights])
    found = {}
    for name, score in scores.items():
        pairs = zip(((weights - 1) @ score.T).T, actual.T, strict=True)
        found[name] = float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))
    return found


def without(run: Run, order: torch.Tensor, part: float) -> float:
    """Return the accuracy after training without the first part of the examples in an order."""
    weights = run.ones.clone()
    weights[order[: int(part * len(order))]] = 0
    # A batch of which a part is left out has smaller gradients. Divide by the rest.
    return run.accuracy(run.train(weights * len(order) / weights.sum()))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print both tables, and return their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with mnist/")
    parser.add_argument("--examples", type=int, default=600, help="to train on")
    parser.add_argument("--trainings", type=int, default=20, help="without 5 %% of the examples, for the LDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw a figure")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    data = read(arguments.data, arguments.examples)
    run = Run(data, arguments.seed)
    scores = {"metagradients": run.metagradients(), "products of gradients": run.products()}
    lds = datamodeling_score(run, scores, arguments.trainings)
    orders = {name: score.sum(0).argsort(descending=True) for name, score in scores.items()}
    orders["random"] = torch.randperm(arguments.examples)
    accuracy = {name: [without(run, order, part) for part in PARTS] for name, order in orders.items()}
    count = int(data.wrong.sum())
    found = {name: float(data.wrong[order[:count]].float().mean()) for name, order in orders.items()}

    print(f"{'':<24}{'LDS':>8}{'wrong':>9}   accuracy without " + "".join(f"{part:>7.0%}" for part in PARTS))
    for name, values in accuracy.items():
        score = f"{lds[name]:.3f}" if name in lds else ""
        print(f"{name:<24}{score:>8}{found[name]:>9.2f}{'':<20}" + "".join(f"{value:7.3f}" for value in values))
    print(f'"wrong": the part of the {count} worst examples that are labelled wrong.')
    if arguments.figure:
        picture(accuracy, arguments.figure)
    return {"lds": lds, "accuracy": accuracy, "wrong": found}


def picture(accuracy: dict[str, list[float]], path: Path) -> None:
    """Draw the accuracy by the number of examples that are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in accuracy.items():
        axes.plot([100 * part for part in PARTS], values, "o-", label=name)
    axes.set(xlabel="% of the examples left out", ylabel="accuracy")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
