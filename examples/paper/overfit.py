"""Overfit a small validation set: one weight decay for each weight of a network, tuned on 50 images.

    python examples/paper/overfit.py --data DIR

Section 5.2 and figure 5 of the paper: with as many hyperparameters as weights, tuning learns the validation images by
heart as training learns those it trains on, and images that neither has seen gain little. One weight decay for all
weights cannot do that. Three lines make it a tuned run: the decays, their optimizer, and `bilevel_torch.backward`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel_torch
import data
import models
import runs
from loop import Loop

METHODS = {
    "identity": "identity",
    "signed": "identity",  # with CHANGES
    "clipped": "identity",
    "cg": {"name": "cg", "preconditioner": "diagonal", "damping": 1.0, "maxiter": 20, "rtol": 0.1},
    "global": "identity",  # one decay for all weights
    "untuned": None,
}


class Net(NamedTuple):
    """A network, and what it is trained on."""

    load: Callable[[Path | None], data.Split]
    build: Callable[[torch.Tensor], nn.Module]  # for images such as this one
    methods: tuple[str, ...] = ("identity", "cg", "global", "untuned")
    seeds: int | None = None  # at most; None: all that are asked for
    start: float = -4.0  # of the logarithm of each decay; deep networks would not come off the ground with that
    slow: bool = False  # takes twice the steps
    signed: int = 0  # how many seeds of the method "signed"


NETS = {
    "linear": Net(data.mnist, lambda image: models.linear(image.numel())),
    "mlp": Net(data.mnist, lambda image: models.mlp(image.numel())),
    "cnn": Net(
        data.cifar10,
        lambda image: models.cnn(*image.shape[:2]),
        ("identity", "signed", "clipped", "global", "untuned"),
        slow=True,
        signed=7,
    ),
    "alexnet": Net(
        data.cifar10, lambda image: models.alexnet(*image.shape[:2]), ("identity", "untuned"), 1, start=-7.0, slow=True
    ),
    "resnet": Net(
        data.cifar10,
        lambda image: models.resnet8(len(image)),
        ("identity", "signed", "untuned"),
        1,
        start=-7.0,
        slow=True,
        signed=3,
    ),
}


@dataclass(frozen=True)
class Setup:
    """What all runs have in common."""

    steps: int  # of the hyperparameters
    every: int = 2  # how many of them to a row
    inner_steps: int = 5  # of training, for each of them
    lr: float = 1e-3
    outer_lr: float = 0.1
    start: float = -4.0
    images: int = 50  # to train on, and as many to validate on
    test: int = 1000
    amsgrad: bool | None = None  # of Adam
    bound: float | None = None  # the hyperparameters are the decays themselves, up to this size; None: their logarithms
    least: float | None = None  # of them; None: as far below zero as above
    until: float | None = None  # the validation accuracy to stop at


FULL, FAST = Setup(steps=100), Setup(steps=16, test=400)
SIGNED: dict[str, Any] = {"outer_lr": 0.003, "start": 0.0, "amsgrad": True, "bound": 0.05, "until": 1.0}
CHANGES = {"signed": SIGNED, "clipped": SIGNED | {"least": 0.0}}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run each network with each method; return the histories."""
    arguments = runs.options(__doc__, argv)
    histories = {}
    for name, net in NETS.items():
        setup, split = replace(FAST if arguments.fast else FULL, start=net.start), net.load(arguments.data)
        if net.slow:
            setup = replace(setup, steps=2 * setup.steps, every=4 * setup.every)
        for method, solver in runs.variants(arguments, METHODS).items():
            if method in METHODS and method not in net.methods:
                continue
            of, seeds = setup, arguments.seeds[: net.seeds]
            if method in CHANGES:
                steps, many = (2 * setup.steps, net.signed) if method == "signed" else (setup.steps // 2, 1)
                of = replace(setup, **CHANGES[method], steps=steps)
                seeds = seeds if arguments.fast else range(many)
            for seed in seeds:
                settings = {key: value for key, value in asdict(of).items() if value is not None}
                settings |= {"data": split.name, "net": name, "solver": solver, "seed": seed}
                variant, job = f"{name}-{method}-{seed}", partial(run, net, method, solver, of, seed, split)
                histories[variant] = runs.stored(arguments, "overfit", variant, settings, job)
    runs.show(histories)
    return histories


def run(kind: Net, method: str, solver: Any, setup: Setup, seed: int, split: data.Split, checkpoint: Path) -> dict:
    """Train a network with tuned decays, and return its history."""
    torch.manual_seed(seed)
    train, val, test = subsets(split, setup)
    net = kind.build(train[0][0])
    optimizer = torch.optim.Adam(net.parameters(), lr=setup.lr, amsgrad=bool(setup.amsgrad))
    shapes = [()] if method == "global" else [w.shape for w in net.parameters()]
    hparams = [torch.full(shape, setup.start, requires_grad=True) for shape in shapes]
    form = torch.exp if setup.bound is None else torch.clone
    outer_optimizer = torch.optim.RMSprop(hparams, lr=setup.outer_lr)

    state = {"net": net, "optimizer": optimizer, "outer": outer_optimizer}
    state |= {f"decays {i}": decays for i, decays in enumerate(hparams)}
    loop = Loop(checkpoint, setup.steps, state, about=checkpoint.stem)
    for step in loop:
        for _ in range(setup.inner_steps):
            optimizer.zero_grad()
            inner_loss(net, map(form, hparams), train).backward(inputs=list(net.parameters()))
            optimizer.step()
        if solver:
            outer_optimizer.zero_grad()
            val_loss = cross_entropy(net(val[0]), val[1])
            bilevel_torch.backward(
                inner_loss(net, map(form, hparams), train), val_loss, net.parameters(), hparams, solver=solver
            )
            outer_optimizer.step()
            if setup.bound is not None:
                for decays in hparams:
                    decays.data.clamp_(-setup.bound if setup.least is None else setup.least, setup.bound)
        loop.done = setup.until is not None and evaluate(net, val=val)["val_accuracy"] >= setup.until
        if loop.done or (step + 1) % setup.every == 0:
            loop.row(step=step + 1, **evaluate(net, train=train, val=val, test=test))
    reached = next((row["step"] for row in loop.rows if row["val_accuracy"] == 1), None)
    final = {name: value for name, value in loop.rows[-1].items() if name != "step"}
    many = sum(decays.numel() for decays in hparams) if solver else 0
    return loop.history(hparams=many, weights=sum(w.numel() for w in net.parameters()), reached=reached, **final)


def inner_loss(net: nn.Module, decays: Iterable[torch.Tensor], train: tuple) -> torch.Tensor:
    """Return the training loss with its penalty; a single decay serves all weights."""
    penalty = sum((d * w**2).sum() for d, w in zip(cycle(decays), net.parameters(), strict=False))
    return cross_entropy(net(train[0]), train[1]) + penalty


def subsets(split: data.Split, setup: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images and labels to train on and to validate on, drawn at random, and to test on."""
    n = setup.images
    drawn = torch.randperm(len(split.train.y)).numpy()
    parts = (split.train, drawn[:n]), (split.train, drawn[n : 2 * n]), (split.test, slice(setup.test))
    return [(torch.as_tensor(part.x[i]), torch.as_tensor(part.y[i])) for part, i in parts]


@torch.no_grad()
def evaluate(net: nn.Module, **parts: tuple) -> dict[str, float]:
    """Return loss and accuracy on each part."""
    found = {}
    for name, (x, y) in parts.items():
        logits = net(x)
        found[f"{name}_loss"] = float(cross_entropy(logits, y))
        found[f"{name}_accuracy"] = float((logits.argmax(1) == y).float().mean())
    return found


if __name__ == "__main__":
    main()
