"""Regularize a language model by a rate for each unit and each weight: dropout, DropConnect, activations.

    python examples/paper/language_model.py --data DIR [--config examples/solver.toml]

Table 4 of the paper. An LSTM with tied embeddings overfits a small text. Its regularizers have 5 hyperparameters, or
65,794: a dropout rate for each unit at its input and its output, one for each weight of its recurrent matrix, and two
penalties on activations. They are tuned in one training run, from small or from large rates. There are also trainings
without tuning, a random search, and successive halving.

Dropout is made differentiable by its concrete relaxation. Its noise belongs to the loss that it was drawn for:
`bilevel_torch.backward` takes products from the graph of that loss, so that all of them see the same noise. A solver
that evaluates losses anew, such as ``unrolled``, would need it as an argument.

The text has four parts: to train, to tune on (one batch a step), to choose the best epoch, and to test.
"""

import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
import data
import runs
from loop import Loop

FULL = {
    "vocabulary": 2000,
    "size": 128,
    "window": 35,
    "batch": 10,
    "train": 30_000,
    "held_out": 7000,
    "epochs": 8,
    "every": 3,  # steps of training, for each step of the hyperparameters
    "outer_learning_rate": 0.1,
}
FAST = FULL | {"vocabulary": 200, "size": 16, "window": 10, "batch": 4, "train": 800, "held_out": 200}
LEARNING_RATE, CLIP, TEMPERATURE = 6e-3, 0.25, 0.1
LOW = {"input": 0.05, "output": 0.05, "recurrent": 0.05, "activation": 1e-2, "slowness": 1e-2}
HIGH = {"input": 0.4, "output": 0.4, "recurrent": 0.3, "activation": 1e-2, "slowness": 0.3}
MOST = 2.0  # of a logit: dropout of 0.88, above which the scale 1 / (1 - rate) of what is left explodes


class Variant(NamedTuple):
    """A way to tune in one training."""

    start: dict[str, float]  # rates and penalties
    solver: Any = None  # None: not tuned
    many: bool = False  # a rate for each unit and each weight


VARIANTS = {
    "none_low": Variant(LOW),
    "none": Variant(HIGH),
    "few": Variant(HIGH, "identity"),
    "many": Variant(HIGH, "identity", many=True),
}
SEARCHES = {"random": [(4, 8)], "halving": [(8, 1), (4, 2), (2, 4), (1, 8)]}  # how many go on, to which epoch


class Regularizers(nn.Module):
    """The hyperparameters: logits of rates, and logarithms of penalties."""

    def __init__(self, rates, size, many):
        super().__init__()
        shapes = {"input": (size,), "output": (size,), "recurrent": (4 * size, size)} if many else {}
        for name, rate in rates.items():
            raw = math.log(rate) if name in ("activation", "slowness") else math.log(rate / (1 - rate))
            self.register_parameter(name, nn.Parameter(torch.full(shapes.get(name, ()), raw)))

    def project(self):
        """Keep dropout below one."""
        for name in ("input", "output", "recurrent"):
            self.get_parameter(name).data.clamp_(max=MOST)


class LanguageModel(nn.Module):
    """One LSTM; the embedding of words is the last layer, too."""

    def __init__(self, vocabulary, size):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, words, regularizers=None):
        """Return logits of the next words, and the activations before and after dropout, for sequences of words."""
        x, recurrent = self.embedding(words), self.lstm.weight_hh_l0
        once = (len(x), 1, x.shape[-1])  # the same units for all words of a sequence
        if regularizers is not None:
            x, recurrent = drop(x, regularizers.input, once), drop(recurrent, regularizers.recurrent)
        hidden, _ = torch.func.functional_call(self.lstm, {"weight_hh_l0": recurrent}, (x,))
        left = hidden if regularizers is None else drop(hidden, regularizers.output, once)
        return left @ self.embedding.weight.T + self.bias, hidden, left


def drop(x, logit, shape=None):
    """Return x with concrete dropout, at a rate of sigmoid(logit)."""
    noise = torch.rand(x.shape if shape is None else shape).logit(1e-6)
    return x * torch.sigmoid(-(logit + noise) / TEMPERATURE) / torch.sigmoid(-logit)


def inner_loss(net, regularizers, words):
    """Return the loss of training."""
    logits, hidden, left = net(words[:, :-1], regularizers)
    slowness = (hidden[:, 1:] - hidden[:, :-1]).pow(2).mean()
    penalty = regularizers.activation.exp() * left.pow(2).mean() + regularizers.slowness.exp() * slowness
    return cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()) + penalty


def outer_loss(net, words):
    """Return the loss without noise and penalties; its exponential is the perplexity."""
    return cross_entropy(net(words[:, :-1])[0].flatten(0, 1), words[:, 1:].flatten())


class Training:
    """A training that may pause after an epoch; its hyperparameters are tuned on the way unless solver is None."""

    def __init__(self, parts, sizes, regularizers, solver=None):
        self.parts, self.sizes, self.regularizers, self.solver = parts, sizes, regularizers, solver
        self.net = LanguageModel(sizes["vocabulary"], sizes["size"])
        self.optimizer = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        self.outer_optimizer = torch.optim.Adam(regularizers.parameters(), sizes["outer_learning_rate"])
        self.epoch = len(parts["train"]) // sizes["batch"]  # in steps
        self.rows, self.seconds = [], 0.0

    def go(self, epochs, path):
        """Train for so many epochs; return the training."""
        state = {"net": self.net, "optimizer": self.optimizer}
        state |= {"regularizers": self.regularizers, "outer": self.outer_optimizer}
        loop, done = Loop(path, self.epoch * epochs, state, about=path.stem), len(self.rows)
        for step in loop:
            self.step(step % self.sizes["every"] == 0)
            if (step + 1) % self.epoch == 0:
                loop.row(epoch=done + (step + 1) // self.epoch, **measure(self.net, self.regularizers, self.parts))
        self.rows, self.seconds = self.rows + loop.rows, self.seconds + loop.cpu_seconds
        return self

    def step(self, tune):
        """Take a step of training, and one of the hyperparameters if it is time to tune."""
        tune = tune and self.solver is not None
        loss = inner_loss(self.net, self.regularizers, draw(self.parts["train"], self.sizes["batch"]))
        self.optimizer.zero_grad()
        loss.backward(retain_graph=tune)
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        if tune:
            self.outer_optimizer.zero_grad()  # of what loss.backward() has left there
            held_out = outer_loss(self.net, draw(self.parts["tune"], 2 * self.sizes["batch"]))
            hparams = dict(self.regularizers.named_parameters())
            bilevel_torch.backward(loss, held_out, self.net.parameters(), hparams, solver=self.solver)
            self.outer_optimizer.step()
            self.regularizers.project()
        self.optimizer.step()

    def best(self):
        """Return the row of the epoch that is best on the text to choose by."""
        return min(self.rows, key=lambda row: row["choose"])

    def history(self):
        """Return the rows, and what came out."""
        counted = {"weights": self.net, "hyperparameters": self.regularizers}
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in counted.items()}
        return {"rows": self.rows, "cpu_seconds": round(self.seconds, 2), "result": counts | self.best()}


@torch.no_grad()
def measure(net, regularizers, parts):
    """Return perplexities on all parts but the one to train on, and mean rates and penalties."""
    row = {name: math.exp(outer_loss(net, part)) for name, part in parts.items() if name != "train"}
    for name, raw in regularizers.named_parameters():
        row[name + "_rate"] = float((raw.exp() if name in ("activation", "slowness") else raw.sigmoid()).mean())
    return row


def draw(windows, batch):
    """Return a random batch."""
    return windows[torch.randint(len(windows), (batch,))]


def cut(sizes, first, second):
    """Return the parts of the text as windows of numbers, by name; rare words are one word."""
    n, m = sizes["train"], sizes["held_out"]
    words = {"train": first[:n], "tune": first[n : n + m], "choose": first[n + m : n + 2 * m], "test": second[:m]}
    common = [word for word, _ in Counter(words["train"]).most_common(sizes["vocabulary"] - 1)]
    numbers = {word: number for number, word in enumerate(common, start=1)}

    def windows(words):
        encoded = torch.tensor([numbers.get(word, 0) for word in words])
        return encoded.unfold(0, sizes["window"] + 1, sizes["window"])

    return {name: windows(part) for name, part in words.items()}


def main(argv=None):
    """Run all variants and seeds; return the histories."""
    arguments = runs.options(__doc__, argv, seeds=3)
    sizes, (name, *texts) = FAST if arguments.fast else FULL, data.words(arguments.data)
    parts, histories = cut(sizes, *texts), {}
    for variant, of in runs.variants(arguments, VARIANTS | SEARCHES).items():
        for seed in arguments.seeds:
            settings = {**sizes, "data": name, "seed": seed, "learning_rate": LEARNING_RATE, "clip": CLIP}
            settings |= {"temperature": TEMPERATURE}
            if variant in SEARCHES:
                settings, job = settings | {"rungs": of}, partial(search, of, parts, sizes, seed)
            else:
                of = of if isinstance(of, Variant) else Variant(HIGH, of, many=True)  # of --config
                settings, job = settings | of._asdict(), partial(run, of, parts, sizes, seed)
            key = f"{variant}-{seed}"
            histories[key] = runs.stored(arguments, "language_model", key, settings, job)
    runs.show(histories)
    return histories


def run(of, parts, sizes, seed, path):
    """Train once, tuned unless there is no solver, and return the history; train again with the rates at the end."""
    torch.manual_seed(seed)
    regularizers = Regularizers(of.start, sizes["size"], of.many)
    solver = None if of.solver is None else bl.get_solver(of.solver)
    history = Training(parts, sizes, regularizers, solver).go(sizes["epochs"], path).history()
    if solver is None:
        return history
    again = Training(parts, sizes, regularizers).go(sizes["epochs"], path.with_suffix(".again")).history()
    history["result"] |= {f"again_{key}": again["result"][key] for key in ("tune", "choose", "test", "epoch")}
    return history | {"again_cpu_seconds": again["cpu_seconds"]}


def search(rungs, parts, sizes, seed, path):
    """Train with random rates. After each rung, the best go on: a rung is their number, and their epochs in all.

    Return the history of the best, and all trials. One rung is a random search.
    """
    rng, trials = np.random.default_rng(seed), []
    torch.manual_seed(seed)
    drawn = (Regularizers(random_rates(rng), sizes["size"], False) for _ in range(rungs[0][0]))
    trainings = [Training(parts, sizes, regularizers) for regularizers in drawn]
    for kept, epochs in rungs:
        if trials:
            trainings = sorted(trainings, key=lambda training: training.best()["choose"])[:kept]
        for number, training in enumerate(trainings):
            before = training.seconds
            training.go(epochs - len(training.rows), path.with_suffix(f".{len(trials)}"))
            trials.append({"epochs": epochs, "number": number, "cpu_seconds": training.seconds - before})
            trials[-1] |= training.best()
    best = min(trainings, key=lambda training: training.best()["choose"]).history()
    return best | {"trials": trials, "cpu_seconds": round(sum(trial["cpu_seconds"] for trial in trials), 2)}


def random_rates(rng):
    """Return rates of a random search."""
    rates = {name: rng.uniform(0, 0.8) for name in ("input", "output", "recurrent")}
    return rates | {name: 10 ** rng.uniform(-3, 0.5) for name in ("activation", "slowness")}


if __name__ == "__main__":
    main()
