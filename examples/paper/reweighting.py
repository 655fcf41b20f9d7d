"""Clean a training set of which half the labels are wrong: a weight per example, or a network that gives the weights.

    python examples/paper/reweighting.py --data DIR

The hyperparameters are the weights of 5,000 training examples, or the parameters of a network from an image and its
label to a weight (the paper's code has one that sees the image alone). They are tuned on 1,000 clean examples, and not
told which of the others are wrong. A model is then trained from scratch with them. The paper reports no figure.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
import data
import runs
from loop import Loop
from models import ExampleWeights, WeightNet


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data and of the runs."""

    train: int = 5000
    validation: int = 1000
    steps: int = 100  # of the hyperparameters
    inner_steps: int = 10  # of the model, for each of them
    retrain_steps: int = 500
    wrong: float = 0.5  # of the training labels
    decay: float = 1e-3  # of the model
    lr: float = 0.01


FULL, FAST = Sizes(), Sizes(train=600, validation=200, steps=40, retrain_steps=200)
CG = {"name": "cg", "maxiter": 10, "rtol": 0.2, "damping": 0.01}
SOLVERS = {"identity": "identity", "neumann": {"name": "neumann", "terms": 10}, "cg": CG, "network": CG}
CONTROLS = ("all", "clean", "validation")  # what to train on with equal weights


class Examples(NamedTuple):
    """Flat images and their labels; ``wrong`` tells which labels are, and serves the figures alone."""

    x: Tensor
    y: Tensor
    wrong: Tensor


class Data(NamedTuple):
    """To train on, to validate on, like the first but never seen, and to test on."""

    train: Examples
    val: Examples
    unseen: Examples
    test: Examples


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the variants; return their histories."""
    arguments = runs.options(__doc__, argv)
    sizes = FAST if arguments.fast else FULL
    split = data.mnist(arguments.data)
    histories = {}
    for variant, solver in runs.variants(arguments, dict.fromkeys(CONTROLS) | SOLVERS).items():
        lr_weights = 0.003 if variant == "network" else 0.3
        settings = asdict(sizes) | {"data": split.name, "variant": variant, "solver": solver, "lr_weights": lr_weights}
        for seed in arguments.seeds:
            job = partial(run, variant, solver, lr_weights, corrupted(split, sizes, seed), sizes, seed)
            name = f"{variant}-{seed}"
            histories[name] = runs.stored(arguments, "reweighting", name, settings | {"seed": seed}, job)
    runs.show(histories)
    return histories


def corrupted(split: data.Split, sizes: Sizes, seed: int) -> Data:
    """Divide the training set into three, and give wrong labels to some of the first and third part."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.as_tensor(split.train.x).flatten(1), torch.as_tensor(split.train.y)
    train, val, unseen = torch.randperm(len(y), generator=generator).tensor_split(
        (sizes.train, sizes.train + sizes.validation)
    )
    wrong = torch.rand(len(y), generator=generator) < sizes.wrong
    wrong[val] = False
    noisy = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10, y)
    x_test, y_test = torch.as_tensor(split.test.x).flatten(1), torch.as_tensor(split.test.y)
    test = Examples(x_test, y_test, torch.zeros_like(y_test, dtype=torch.bool))
    return Data(*(Examples(x[part], noisy[part], wrong[part]) for part in (train, val, unseen)), test)


def run(variant: str, solver: Any, lr_weights: float, d: Data, sizes: Sizes, seed: int, checkpoint: Path) -> dict:
    """Return the history of one variant."""
    torch.manual_seed(seed)
    if variant in CONTROLS:
        examples = d.val if variant == "validation" else d.train
        weights = (~examples.wrong).float() if variant == "clean" else torch.ones(len(examples.y))
        return {"rows": [], "result": evaluate(retrained(examples, weights, sizes), d)}
    weigh = WeightNet(d.train.x.shape[1], 10) if variant == "network" else ExampleWeights(len(d.train.y))
    loop = tune(weigh, solver, lr_weights, d, sizes, checkpoint)
    found = describe(weigh, d.train)
    if variant == "network":
        found["auc_unseen"] = describe(weigh, d.unseen)["auc"]
    weights = weigh(d.train.x, d.train.y).detach()
    found |= evaluate(retrained(d.train, weights, sizes), d)
    parts = {"right": weights[~d.train.wrong], "wrong": weights[d.train.wrong]}
    counts = {name: torch.histc(part, 20, 0, 1).int().tolist() for name, part in parts.items()}
    return {**loop.history(hparams=sum(p.numel() for p in weigh.parameters()), **found), "histogram": counts}


def inner_loss(model: nn.Module, examples: Examples, weights: Tensor, decay: float) -> Tensor:
    """Return the weighted loss that the model is trained on."""
    losses = cross_entropy(model(examples.x), examples.y, reduction="none")
    return (weights * losses).mean() + decay * sum((w**2).sum() for w in model.parameters())


def tune(weigh: nn.Module, solver: Any, lr_weights: float, d: Data, sizes: Sizes, checkpoint: Path) -> Loop:
    """Tune the weights by hypergradients while a model is trained with them."""
    model = nn.Linear(d.train.x.shape[1], 10)
    optimizer = torch.optim.Adam(model.parameters(), sizes.lr)
    outer_optimizer = torch.optim.Adam(weigh.parameters(), lr_weights)
    solver = bl.WarmStart(solver)
    state = {"model": model, "optimizer": optimizer, "weigh": weigh, "outer": outer_optimizer, "solver": solver}
    loop = Loop(checkpoint, sizes.steps, state, about=checkpoint.stem)
    for step in loop:
        weights = weigh(d.train.x, d.train.y).detach()
        for _ in range(sizes.inner_steps):
            optimizer.zero_grad()
            inner_loss(model, d.train, weights, sizes.decay).backward()
            optimizer.step()
        outer_optimizer.zero_grad()
        train_loss = inner_loss(model, d.train, weigh(d.train.x, d.train.y), sizes.decay)
        val_loss = cross_entropy(model(d.val.x), d.val.y)
        bilevel_torch.backward(train_loss, val_loss, model.parameters(), weigh.parameters(), solver=solver)
        outer_optimizer.step()
        if step % (sizes.steps // 20) == 0 or step == sizes.steps - 1:
            loop.row(step=step, val_loss=val_loss.item(), **describe(weigh, d.train))
    return loop


def retrained(examples: Examples, weights: Tensor, sizes: Sizes) -> nn.Module:
    """Return a model trained from scratch."""
    model = nn.Linear(examples.x.shape[1], 10)
    optimizer = torch.optim.Adam(model.parameters(), sizes.lr)
    for _ in range(sizes.retrain_steps):
        optimizer.zero_grad()
        inner_loss(model, examples, weights, sizes.decay).backward()
        optimizer.step()
    return model


@torch.no_grad()
def evaluate(model: nn.Module, d: Data) -> dict[str, float]:
    """Return what a model is worth."""
    val, test = model(d.val.x), model(d.test.x)
    return {
        "val_loss": cross_entropy(val, d.val.y).item(),
        "test_loss": cross_entropy(test, d.test.y).item(),
        "test_accuracy": (test.argmax(1) == d.test.y).float().mean().item(),
    }


@torch.no_grad()
def describe(weigh: nn.Module, examples: Examples) -> dict[str, float]:
    """Return how well weights tell right labels from wrong ones."""
    weights, wrong = weigh(examples.x, examples.y), examples.wrong
    right, ranks = ~wrong.numpy(), rankdata(weights.numpy())
    n = right.sum()
    return {
        # The chance that an example with a right label weighs more than one with a wrong label.
        "auc": float((ranks[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n))),
        "weight_right": weights[~wrong].mean().item(),
        "weight_wrong": weights[wrong].mean().item(),
    }


if __name__ == "__main__":
    main()
