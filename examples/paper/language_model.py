"""Regularize a language model by a rate for each unit and each weight: dropout, DropConnect, activations.

    python examples/paper/language_model.py --data DIR [--config examples/solver.toml]

Table 4 of the paper. An LSTM with tied embeddings overfits a small text. Its regularizers have 5 hyperparameters, or
65,794: a dropout rate for each unit at its input and its output, one for each weight of its recurrent matrix, and two
penalties on activations. They are tuned in the one training run there is, against none tuned and a random search.

Dropout is made differentiable by its concrete relaxation. Its noise belongs to the loss that it was drawn for:
`bilevel_torch.backward` takes products from the graph of that loss, so that all of them see the same noise. A solver
that evaluates losses anew, such as ``unrolled``, would need it as an argument.

The text has four parts: to train, to tune on (one batch a step), to choose the best epoch, and to test.
"""

import math
from collections import Counter
from functools import partial

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
    "batch": 20,
    "train": 60_000,
    "held_out": 7000,
    "epochs": 12,
    "every": 3,  # steps of training, for each step of the hyperparameters
    "outer_learning_rate": 0.1,
}
FAST = FULL | {"vocabulary": 200, "size": 16, "window": 10, "batch": 8, "train": 800, "held_out": 200}
LEARNING_RATE, CLIP, TEMPERATURE, TRIALS = 4e-3, 0.25, 0.1, 2  # as many trials as fit into the time of a tuned run
START = {"input": 0.05, "output": 0.05, "recurrent": 0.05, "activation": 1e-2, "slowness": 1e-2}
MOST = 2.0  # of a logit: dropout of 0.88, above which the scale 1 / (1 - rate) of what is left explodes
SOLVERS = {
    "none": None,
    "few": "identity",
    "many": "identity",
    "many_neumann": {"name": "neumann", "terms": 1, "step_size": 0.1, "damping": 0.5},
    **{f"random_{trial}": None for trial in range(TRIALS)},
}


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


def run(parts, sizes, seed, rates, many, solver, path):
    """Train once, tuned unless solver is None; return the history."""
    torch.manual_seed(seed)
    net = LanguageModel(sizes["vocabulary"], sizes["size"])
    regularizers = Regularizers(rates, sizes["size"], many)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    outer_optimizer = torch.optim.Adam(regularizers.parameters(), sizes["outer_learning_rate"])
    state = {"net": net, "optimizer": optimizer, "regularizers": regularizers, "outer": outer_optimizer}
    epoch = len(parts["train"]) // sizes["batch"]
    loop = Loop(path, epoch * sizes["epochs"], state, about=path.stem)
    for step in loop:
        loss = inner_loss(net, regularizers, draw(parts["train"], sizes["batch"]))
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        if solver is not None and step % sizes["every"] == 0:
            outer_optimizer.zero_grad()  # of what loss.backward() has left there
            held_out = outer_loss(net, draw(parts["tune"], sizes["batch"]))
            hparams = dict(regularizers.named_parameters())
            bilevel_torch.backward(loss, held_out, net.parameters(), hparams, solver=solver)
            outer_optimizer.step()
            regularizers.project()
        optimizer.step()
        if (step + 1) % epoch == 0:
            loop.row(epoch=(step + 1) // epoch, **measure(net, regularizers, parts))
    best = min(loop.rows, key=lambda row: row["choose"])
    counted = {"weights": net, "hyperparameters": regularizers}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in counted.items()}
    return loop.history(**counts, **best)


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


def random_rates(seed):
    """Return rates of a random search."""
    rng = np.random.default_rng(seed)
    rates = {name: rng.uniform(0, 0.8) for name in ("input", "output", "recurrent")}
    return rates | {name: 10 ** rng.uniform(-3, 0.5) for name in ("activation", "slowness")}


def main(argv=None):
    """Run all variants and seeds; return the histories."""
    arguments = runs.options(__doc__, argv, seeds=2)
    sizes, (name, *texts) = FAST if arguments.fast else FULL, data.words(arguments.data)
    parts, histories = cut(sizes, *texts), {}
    for variant, solver in runs.variants(arguments, SOLVERS).items():
        for seed in arguments.seeds:
            rates = random_rates([seed, int(variant[-1])]) if variant.startswith("random") else START
            settings = {**sizes, "data": name, "seed": seed, "solver": solver, "rates": rates}
            settings |= {"learning_rate": LEARNING_RATE, "clip": CLIP, "temperature": TEMPERATURE}
            tuned = None if solver is None else bl.get_solver(solver)
            work = partial(run, parts, sizes, seed, rates, variant.startswith(("many", "config")), tuned)
            histories[f"{variant}-{seed}"] = runs.stored(
                arguments, "language_model", f"{variant}-{seed}", settings, work
            )
    runs.show(histories)
    return histories


if __name__ == "__main__":
    main()
