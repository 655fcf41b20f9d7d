"""Tune a whole learning-rate schedule by the derivative of a training run, against two cheaper ways.

    python examples/pytorch/learning_rate_schedule.py [--data DIR] [--figure FILE.png]

A transformer of two layers learns to continue a text, character by character, with AdamW and clipped gradients. The
hyperparameters are logarithms: for the last layer and for the other weights, learning rates at six points of the run
and a weight decay. Three methods have the same time to find a small validation loss at the end of the run. Each starts
with the same four constant rates.

- metagradient descent: from the best of these, `bl.metagradient` differentiates the run, and a few trainings choose how
  far to follow the derivative.
- random search: schedules with random peaks, warmups and ends, and random decays.
- greedy hypergradients: each step changes the rates and decays by the derivative of the validation loss after that one
  step. The start and the size of the changes are random.

The text is WikiText-2 with --data, in the folder of `examples/paper/data.py`. Otherwise it is the reference of Python,
which Python comes with.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import bilevel as bl
import bilevel_torch

GROUPS, POINTS = 2, 6  # of weights; of the schedule of a group
WIDTH, HEADS, CONTEXT, CHARACTERS, BATCH, HELD_OUT = 32, 2, 32, 48, 4, 64
RATES, DECAY, FIRST_CHANGE = (1e-3, 3e-3, 1e-2, 3e-2), 1e-2, 0.3  # of logarithms
LINE_SEARCH = 4  # trainings for each metagradient, at most
HParams = dict[str, torch.Tensor]


class Layer(nn.Module):
    """Attention to earlier characters, then a network for each character."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (a.unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in self.qkv(self.norms[0](x)).chunk(3, -1))
        # The kernel of scaled_dot_product_attention for CPUs has no second derivative.
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -1e9).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).flatten(2))
        return x + self.network(self.norms[1](x))


class Transformer(nn.Module):
    """A language model of characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place_embedding = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer(), nn.LayerNorm(WIDTH))
        self.output = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(self.embedding(x) + self.place_embedding.weight))


def loss_of(model: Any, hparams: Any, text: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next characters."""
    return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


class Task:
    """A training run from a fixed first state with fixed batches."""

    def __init__(self, text: torch.Tensor, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.steps, model = steps, Transformer()
        groups = [], []  # the last layer, and the others
        for name, weight in model.named_parameters():
            groups[not name.startswith("output")].append(weight)
        optimizer = torch.optim.AdamW([{"params": weights} for weights in groups])
        self.step = bilevel_torch.TrainingStep(model, optimizer, loss_of, clip_norm=1.0, options=self.options)
        self.first = self.step.init()
        train, *held_out = text.tensor_split((8 * len(text) // 10, 9 * len(text) // 10))
        self.batches = [train[torch.randint(len(train), (BATCH,))] for _ in range(steps)]
        self.validation, self.test = (part[torch.randint(len(part), (HELD_OUT,))] for part in held_out)
        self.training = bl.Training(self.step, lambda state, hparams: self.loss(state, self.validation))

    def options(self, hparams: HParams, t: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the rate of a step, between two points of the schedule, and the decay of a group of weights."""
        rates, decay = hparams["log_rates"][group["index"]], hparams["log_decays"][group["index"]]
        place = t / (self.steps - 1) * (len(rates) - 1)
        left = min(int(place), max(0, len(rates) - 2))
        log_rate = rates[left] if place == left else torch.lerp(rates[left], rates[left + 1], place - left)
        return {"lr": log_rate.exp(), "weight_decay": decay.exp()}

    def loss(self, state: Any, text: torch.Tensor) -> torch.Tensor:
        return self.step.evaluate(state, loss_of, None, text)

    def value(self, state: Any) -> float:
        """Return the validation loss, or the largest number if the run has diverged."""
        value = float(self.loss(state, self.validation).detach())
        return value if math.isfinite(value) else math.inf

    @torch.no_grad()
    def train(self, hparams: HParams) -> Any:
        state = self.first
        for batch in self.batches:
            state = self.step(state, hparams, batch)
        return state


def detached(state: Any) -> Any:
    """Return a state without its graph."""
    cut = lambda tensors: {k: a.detach() if isinstance(a, torch.Tensor) else a for k, a in tensors.items()}  # noqa: E731
    return state._replace(params=cut(state.params), optimizer={k: cut(slots) for k, slots in state.optimizer.items()})


class Trial(NamedTuple):
    """Hyperparameters and the last state of their run."""

    hparams: HParams
    state: Any


def constant(rate: float, points: int = POINTS) -> HParams:
    """Return the logarithms of a constant schedule."""
    return {
        "log_rates": torch.full((GROUPS, points), rate).log(),
        "log_decays": torch.full((GROUPS,), DECAY).log(),
    }


def coarse(task: Task) -> Iterator[Trial]:
    """Train with constant rates."""
    for rate in RATES:
        yield Trial(constant(rate), task.train(constant(rate)))


def metagradient_descent(task: Task, generator: torch.Generator) -> Iterator[Trial]:
    """Follow the derivative of the run. Trainings, which are cheaper, choose how far."""
    trials = list(coarse(task))
    yield from trials
    best = min(trials, key=lambda trial: task.value(trial.state))
    average, size = {name: torch.zeros_like(value) for name, value in best.hparams.items()}, FIRST_CHANGE
    while True:
        start, grad = best.hparams, bl.metagradient(task.training, task.first, best.hparams, task.batches).grad
        average = {name: a / 2 + grad[name] for name, a in average.items()}
        # Large derivatives count by their sign, since derivatives by rates differ by orders of magnitude.
        direction = {name: -a / (a.abs() + a.abs().mean()) for name, a in average.items()}
        for _ in range(LINE_SEARCH):
            hparams = {name: value + size * direction[name] for name, value in start.items()}
            trial = Trial(hparams, task.train(hparams))
            yield trial
            better = task.value(trial.state) < task.value(best.state)
            if not better and best.hparams is not start:
                break  # the one before was the best of this line
            best, size = (trial, 2 * size) if better else (best, size / 3)
        else:
            continue
        size /= 2


def random_search(task: Task, generator: torch.Generator) -> Iterator[Trial]:
    """Draw schedules: up to a peak and down to a part of it, with a factor for each group of weights."""
    yield from coarse(task)
    places = torch.linspace(0, 1, POINTS)
    while True:
        draw = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator)  # noqa: E731
        peak, at, factors = draw(math.log(5e-3), math.log(5e-2), 1), draw(0.01, 0.3, 1), draw(-0.5, 0.5, GROUPS, 1)
        up, down = (1 - places / at).clamp(0), ((places - at) / (1 - at)).clamp(0)
        log_rates = peak + factors - up * math.log(10) - down * draw(0, math.log(30), 1)
        hparams = {"log_rates": log_rates, "log_decays": draw(math.log(1e-3), math.log(0.3), GROUPS)}
        yield Trial(hparams, task.train(hparams))


def greedy(task: Task, generator: torch.Generator) -> Iterator[Trial]:
    """Change rates and decays in each step."""
    yield from coarse(task)
    while True:
        first, change = torch.rand(2, generator=generator).tolist()
        hparams = {name: a.requires_grad_() for name, a in constant(1e-3 * 100**first, points=1).items()}
        optimizer = torch.optim.Adam(hparams.values(), 0.005 * 50**change)
        state, rates = task.first, []
        for batch in task.batches:
            rates.append(hparams["log_rates"].detach().clone())
            after = task.step(state, hparams, batch)
            optimizer.zero_grad()
            task.loss(after, task.validation[:BATCH]).backward(inputs=list(hparams.values()))
            optimizer.step()
            state = detached(after)
        at = torch.linspace(0, task.steps - 1, POINTS).long()
        yield Trial({"log_rates": torch.cat(rates, 1)[:, at], "log_decays": hparams["log_decays"].detach()}, state)


METHODS = {"metagradient descent": metagradient_descent, "random search": random_search, "greedy": greedy}


class Search(NamedTuple):
    """The times and losses at which a search found something better, its best trial, and the number of trials."""

    times: list[float]
    losses: list[float]
    best: Trial
    trials: int


def search(task: Task, trials: Iterator[Trial], seconds: float, about: str) -> Search:
    """Take trials until the time is over. At least six."""
    times, losses, best, count = [], [], None, 0
    start = time.process_time()  # of this process only
    with tqdm(desc=about, unit="trial") as bar:
        while count < 6 or time.process_time() - start < seconds:
            trial, now, count = next(trials), time.process_time() - start, count + 1
            value = task.value(trial.state)
            if best is None or value < losses[-1]:
                times, losses, best = [*times, now], [*losses, value], trial
            bar.update()
            bar.set_postfix(best=f"{losses[-1]:.4f}")
    assert best is not None
    return Search(times, losses, best, count)


def read(folder: Path | None) -> tuple[str, torch.Tensor]:
    """Return the name of a text, and all windows of CONTEXT + 1 characters as numbers. Rare characters are one."""
    if folder is None:
        from pydoc_data.topics import topics

        name, text = "the reference of Python", "\n".join(topics[key] for key in sorted(topics))
    else:
        name, text = "WikiText-2", (folder / "wikitext2_validtest" / "valid.txt").read_text("utf-8")
    text = text[:400_000].lower()
    numbers = {c: i for i, (c, _) in enumerate(Counter(text).most_common(CHARACTERS - 1), start=1)}
    return name, torch.tensor([numbers.get(c, 0) for c in text]).unfold(0, CONTEXT + 1, 1)


def picture(found: dict[str, list[Search]], seconds: float, path: Path) -> None:
    """Draw losses against time for all seeds, and the best schedules of the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, rates = figure.subplots(1, 2)
    for i, (name, searches) in enumerate(found.items()):
        for s in searches:
            label = name if s is searches[0] else None
            losses.step(
                [*s.times, max(seconds, s.times[-1])], [*s.losses, s.losses[-1]], f"C{i}", where="post", label=label
            )
        for log_rates, line in zip(searches[0].best.hparams["log_rates"], "-:", strict=True):
            rates.semilogy(torch.linspace(0, 1, POINTS), log_rates.exp(), f"C{i}{line}")
    losses.set(xlabel="seconds", ylabel="best validation loss")
    rates.set(xlabel="part of the run", ylabel="learning rate", title="last layer (solid), other weights (dotted)")
    losses.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main(argv: list[str] | None = None) -> dict[str, list[Search]]:
    """Search by the three methods, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with wikitext2_validtest/")
    parser.add_argument("--steps", type=int, default=150, help="of a training run")
    parser.add_argument("--seconds", type=float, default=18, help="for each method and seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw a figure")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    name, text = read(arguments.data)
    found: dict[str, list[Search]] = {method: [] for method in METHODS}
    print(f"{name}\n{'':<24}{'seed':>5}{'trials':>8}{'first':>8}{'best':>8}{'test':>8}   rates, decays")
    for seed in range(arguments.seeds):
        task = Task(text, arguments.steps, seed)
        for method, trials in METHODS.items():
            generator = torch.Generator().manual_seed(seed)
            result = search(task, trials(task, generator), arguments.seconds, method)
            found[method].append(result)
            test = float(task.loss(result.best.state, task.test).detach())
            numbers = [value.exp().flatten().tolist() for value in result.best.hparams.values()]
            rates, decays = (", ".join(f"{x:.2g}" for x in xs) for xs in numbers)
            print(
                f"{method:<24}{seed:>5}{result.trials:>8}{result.losses[0]:>8.3f}{result.losses[-1]:>8.3f}{test:>8.3f}"
                f"   {rates}; {decays}"
            )
    if arguments.figure:
        picture(found, arguments.seconds, arguments.figure)
    return found


if __name__ == "__main__":
    main()
