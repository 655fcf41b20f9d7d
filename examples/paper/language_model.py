"""Regularize a language model by a rate for each unit and each weight: dropout, DropConnect, activations.

    python examples/paper/language_model.py --data DIR [--config examples/solver.toml]

Table 4 of the paper. An LSTM with tied embeddings overfits a small text. Its regularizers have 5 hyperparameters, or
65,794: a dropout rate for each unit at its input and its output, one for each weight of its recurrent matrix, and two
penalties on activations. They are tuned in one training run, from its start or in its second half. There are also
trainings without tuning, a random search, and successive halving.

Dropout is made differentiable by its concrete relaxation. Its noise belongs to the loss that it was drawn for:
`bilevel_torch.backward` takes products from the graph of that loss, so that all of them see the same noise. A solver
that evaluates losses anew, such as ``unrolled``, would need it as an argument.

The text has four parts: to train, to tune on (one batch a step), to choose the best epoch, and to test.
"""

import math
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
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
    "epochs": 12,
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
    wait: float = 0.0  # part of the training before the first step of the hyperparameters


VARIANTS = {
    "none_low": Variant(LOW),
    "none": Variant(HIGH),
    "many": Variant(HIGH, "identity", many=True),
    "few_late": Variant(HIGH, "identity", wait=0.5),
    "many_late": Variant(HIGH, "identity", many=True, wait=0.5),
}
SEARCHES = {"random": [(3, 12)], "halving": [(8, 1), (4, 3), (2, 6), (1, 12)]}  # how many go on, to which epoch
DERIVED = {"derivative": {"epochs": 8, "every": 6}}  # four trainings take long
SEEDS = {"many": 2, "few_late": 2, "derivative": 2}  # at most


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
    """A training that may pause after an epoch; its hyperparameters are tuned on the way unless solver is None.

    There are no steps of the hyperparameters in the first part of the training, ``wait``.
    """

    def __init__(self, parts, sizes, regularizers, solver=None, wait=0.0):
        self.parts, self.sizes, self.regularizers, self.solver = parts, sizes, regularizers, solver
        self.net = LanguageModel(sizes["vocabulary"], sizes["size"])
        self.optimizer = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        self.outer_optimizer = torch.optim.Adam(regularizers.parameters(), sizes["outer_learning_rate"])
        self.epoch = len(parts["train"]) // sizes["batch"]  # in steps
        self.first = round(wait * sizes["epochs"]) * self.epoch  # step that may tune
        self.rows, self.seconds = [], 0.0

    def go(self, epochs, path):
        """Train for so many epochs; return the training."""
        state = {"net": self.net, "optimizer": self.optimizer}
        state |= {"regularizers": self.regularizers, "outer": self.outer_optimizer}
        loop, done = Loop(path, self.epoch * epochs, state, about=path.stem), len(self.rows)
        for step in loop:
            self.step(step % self.sizes["every"] == 0 and done * self.epoch + step >= self.first)
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
    arguments = runs.options(__doc__, argv, seeds=5)
    sizes, (name, *texts) = FAST if arguments.fast else FULL, data.words(arguments.data)
    parts, histories = cut(sizes, *texts), {}
    for variant, of in runs.variants(arguments, VARIANTS | SEARCHES | DERIVED).items():
        for seed in arguments.seeds[: SEEDS.get(variant)]:
            settings = {**sizes, "data": name, "seed": seed, "learning_rate": LEARNING_RATE, "clip": CLIP}
            settings |= {"temperature": TEMPERATURE}
            if variant in SEARCHES:
                settings, job = settings | {"rungs": of}, partial(search, of, parts, sizes, seed)
            elif variant in DERIVED:
                settings, job = settings | of | {"start": HIGH}, partial(derive, parts, sizes | of, seed)
            else:
                of = of if isinstance(of, Variant) else Variant(HIGH, of, many=True, wait=0.5)  # of --config
                settings, job = settings | of._asdict(), partial(run, of, parts, sizes, seed)
            key = f"{variant}-{seed}"
            histories[key] = runs.stored(arguments, "language_model", key, settings, job)
    runs.show(histories)
    return histories


def run(of, parts, sizes, seed, path):
    """Train once, tuned unless there is no solver, and return the history."""
    torch.manual_seed(seed)
    regularizers = Regularizers(of.start, sizes["size"], of.many)
    solver = None if of.solver is None else bl.get_solver(of.solver)
    return Training(parts, sizes, regularizers, solver, of.wait).go(sizes["epochs"], path).history()


def loss_by_epoch(net, rates, batch):
    """Return the loss of training for rates by epoch, and a batch with the number of its epoch."""
    epoch, words = batch
    return inner_loss(net, SimpleNamespace(**{name: rate[epoch] for name, rate in rates.items()}), words)


def whole_training(net, parts, sizes):
    """Return a training that can be differentiated by its rates of each epoch, and its batches."""
    optimizer, epoch = torch.optim.Adam(net.parameters(), LEARNING_RATE), len(parts["train"]) // sizes["batch"]
    step = bilevel_torch.TrainingStep(net, optimizer, loss_by_epoch, clip_norm=CLIP)
    batches = [(t // epoch, draw(parts["train"], sizes["batch"])) for t in range(epoch * sizes["epochs"])]
    return bl.Training(step, lambda state, rates: step.evaluate(state, outer_loss, parts["tune"])), batches


def derive(parts, sizes, seed, path):
    """Differentiate the tuning loss after a training with the high start, by the 5 rates of each epoch.

    Return this derivative, and how many hypergradients by the identity would raise each rate, in each epoch.
    """
    del path  # minutes, not worth a checkpoint
    torch.manual_seed(seed)
    net, epochs = LanguageModel(sizes["vocabulary"], sizes["size"]), sizes["epochs"]
    (training, batches), params = whole_training(net, parts, sizes), list(net.parameters())
    start = Regularizers(HIGH, sizes["size"], False).state_dict()
    rates = {name: raw.expand(epochs).clone() for name, raw in start.items()}
    began, state = time.process_time(), training.step.init()
    whole, seconds = bl.metagradient(training, state, rates, batches).grad, time.process_time() - began
    rates, raised = {name: rate.requires_grad_() for name, rate in rates.items()}, Counter()
    for number, batch in enumerate(batches):
        if number % sizes["every"] == 0:
            training.step.load(state)
            held_out = outer_loss(net, draw(parts["tune"], 2 * sizes["batch"]))
            loss = loss_by_epoch(net, rates, batch)
            grad = bilevel_torch.hypergradient(loss, held_out, params, rates, solver="identity").grad
            raised.update({(name, batch[0]): float(grad[name][batch[0]] < 0) for name in rates} | {batch[0]: 1})
        with torch.no_grad():  # no graph of the run
            state = training.step(state, rates, batch)
    rows = [{"epoch": epoch + 1} for epoch in range(epochs)]
    for epoch, row in enumerate(rows):
        row |= {f"{name}_derivative": float(whole[name][epoch]) for name in rates}
        row |= {f"{name}_raised": raised[name, epoch] / raised[epoch] for name in rates}
    return {"rows": rows, "result": {"derivative_cpu_seconds": round(seconds, 2)}}


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
