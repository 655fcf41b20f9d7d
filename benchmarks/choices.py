"""Change one setting of a search at a time: outer batch, frequency, damping, outer rate, warm start, data.

    OMP_NUM_THREADS=1 python -m benchmarks.choices [--seeds 3] [--only "damping"]

Two fifths of 800 labels of scikit-learn's digits are replaced by random ones. A perceptron trains on all of them by 600
steps of Adam, with a weight for each example. After every tenth step, a hypergradient of the loss on clean validation
images changes the weights. The script prints a table: the F1 score of the labels called wrong (a weight below a half),
accuracies, and how the linear solves ended.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import bilevel as bl
import bilevel_torch
from benchmarks.first_order.cleaning import accuracy, f1_score

TRAINING, WRONG, STEPS = 800, 0.4, 600


@dataclass(frozen=True)
class Choice:
    """The settings of a run. The defaults are the first row of the table."""

    validation: int = 200  # images
    outer_batch: int = 200  # of them, for each hypergradient
    inner_batch: int = TRAINING  # examples of a training step and of a hypergradient
    every: int = 10  # training steps
    rate: float = 0.3
    optimizer: str = "Adam"
    warm: bool = True
    solver: bl.CG = field(default_factory=lambda: bl.CG(damping=0.1, maxiter=20, rtol=1e-2))


BASE = Choice()
FEW = replace(BASE.solver, maxiter=2, rtol=None)
CHOICES: dict[str, Choice | None] = {
    "base": BASE,
    "no hypergradients": None,
    **{f"outer batch {n}": replace(BASE, outer_batch=n) for n in (10, 50)},
    **{f"every {n}" + (" steps" if n > 1 else " step"): replace(BASE, every=n) for n in (1, 3, 30, 100)},
    **{f"damping {d}": replace(BASE, solver=replace(BASE.solver, damping=d)) for d in (0.0, 0.01, 1.0, "auto")},
    **{f"Adam, rate {r}": replace(BASE, rate=r) for r in (0.01, 0.03, 0.1, 1.0, 3.0)},
    **{f"SGD, rate {r:g}": replace(BASE, optimizer="SGD", rate=r) for r in (100.0, 1000.0, 10_000.0)},
    "2 steps of CG, warm": replace(BASE, solver=FEW),
    "2 steps of CG, cold": replace(BASE, solver=FEW, warm=False),
    **{f"{n} validation images": replace(BASE, validation=n, outer_batch=n) for n in (20, 50, 100, 400)},
}
AUTO = replace(BASE.solver, damping="auto")
CHOICES |= {
    f"{name}, damping auto": replace(choice, solver=AUTO)
    for name, choice in CHOICES.items()
    if choice and name in ("outer batch 10", "every 1 step", "every 100 steps")
}
CHOICES |= {
    f"inner batch 200, every 3 steps, {name}": replace(BASE, inner_batch=200, every=3, solver=solver, warm=warm)
    for name, solver, warm in [
        *((f"damping {d}", replace(BASE.solver, damping=d), True) for d in (0.01, 0.1, 1.0)),
        ("damping auto", AUTO, True),
        ("damping auto, cold", AUTO, False),
    ]
}


@dataclass
class Outcome:
    """The numbers of a run."""

    f1: float
    validation: float
    test: float
    again: float  # the test accuracy of a new training with the weights found
    steps: int
    statuses: Counter[str]


def main() -> None:
    """Run all choices for all seeds, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only settings whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| setting | F1 | validation accuracy | test accuracy | again | steps of CG | statuses |\n|" + "---|" * 7)
    for name, choice in tqdm([item for item in CHOICES.items() if arguments.only in item[0]], unit="setting"):
        outcomes = [run(choice, seed) for seed in range(arguments.seeds)]
        cells = [f"{median(outcomes, key):.3f}" for key in ("f1", "validation", "test", "again")]
        statuses = sum((o.statuses for o in outcomes), Counter[str]())
        total = sum(statuses.values())
        ends = ", ".join(f"{status} {count / total:.0%}" for status, count in statuses.most_common()) or "–"
        print(f"| {name} | {' | '.join(cells)} | {median(outcomes, 'steps'):.0f} | {ends} |", flush=True)


def median(outcomes: list[Outcome], key: str) -> float:
    """Return the median of a number over the seeds."""
    return sorted(float(getattr(outcome, key)) for outcome in outcomes)[len(outcomes) // 2]


def run(choice: Choice | None, seed: int) -> Outcome:
    """Train once with hypergradients, and once more with the weights found."""
    torch.manual_seed(seed)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    x, labels = images[order].float() / 16, labels[order]
    y = torch.where(torch.rand(len(x)) < WRONG, torch.randint(10, (len(x),)), labels)
    last = TRAINING + (choice or BASE).validation
    wrong = y[:TRAINING] != labels[:TRAINING]
    train = (x[:TRAINING], y[:TRAINING])
    held_out, test = (x[TRAINING:last], labels[TRAINING:last]), (x[1200:], labels[1200:])

    scores, solves = torch.zeros(TRAINING, requires_grad=True), []
    net = trained(train, scores, held_out if choice else None, choice or BASE, solves, seed)
    again = trained(train, scores.detach(), None, BASE, [], seed + 1000)
    return Outcome(
        f1=f1_score(scores.detach() < 0, wrong),
        validation=accuracy(net, held_out),
        test=accuracy(net, test),
        again=accuracy(again, test),
        steps=sum(int(info.steps) for info in solves),
        statuses=Counter(info.status.name for info in solves),
    )


def trained(train: Any, scores: Any, held_out: Any, choice: Choice, solves: list[Any], seed: int) -> nn.Module:
    """Train a network. With held-out images, also change the scores, and append to ``solves`` how each solve ended."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    outer_optimizer = getattr(torch.optim, choice.optimizer)([scores], lr=choice.rate) if held_out else None
    solver = bl.WarmStart(choice.solver) if choice.warm else choice.solver

    def inner_loss() -> torch.Tensor:
        losses = cross_entropy(net(train[0][examples]), train[1][examples], reduction="none")
        weighted = (scores[examples].sigmoid() * losses).mean()
        return weighted + 1e-3 * sum((p**2).sum() for p in net.parameters())

    examples = torch.arange(TRAINING)
    for step in range(1, STEPS + 1):
        if choice.inner_batch < TRAINING:
            examples = torch.randperm(TRAINING)[: choice.inner_batch]
        optimizer.zero_grad()
        inner_loss().backward(inputs=list(net.parameters()))
        optimizer.step()
        if outer_optimizer and step % choice.every == 0:
            batch = torch.randperm(len(held_out[1]))[: choice.outer_batch]
            outer_loss = cross_entropy(net(held_out[0][batch]), held_out[1][batch])
            outer_optimizer.zero_grad()
            hg = bilevel_torch.backward(
                inner_loss(), outer_loss, net.parameters(), scores, solver=solver, on_failure="ignore"
            )
            solves.append(hg.info)
            outer_optimizer.step()
    return net


if __name__ == "__main__":
    main()
