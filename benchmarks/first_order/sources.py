"""Find the sources of text whose words are shuffled, while a small transformer trains.

WikiText-2's validation and test texts are cut into eight sources. The words of four are shuffled within each sequence.
A softmax of eight numbers weights the losses of the sources. A hypergradient of the loss on clean text changes them
every few steps. Printed for each method and seed: the AUC of the weights (clean against shuffled), the loss on held-out
clean text, CPU seconds, and for the first seed the peak memory of all tensors in a short run. "uniform" trains without
hypergradients, "clean" on the clean half only. "sampled" is "sama" with sequences drawn in proportion to the weights.
With --again, a new network is also trained with the weights found. Printed in the end: medians over the seeds, and of
the ratios to "clean" with the same seed. `search` has random search and successive halving.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.sources --data DIR [--methods ...] [--seeds 5] [--compile]
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import bilevel_torch
from bilevel_torch.data import DataWeights, WeightedSampler

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
import data

SOURCES = 8
RATE = 3e-3  # of AdamW. It falls linearly, in each method
METHODS = ["uniform", "clean", "identity", "sama", "sampled", "tracked"]
RATIOS = ["validation loss", "test loss", "CPU seconds", "MiB"]  # which are compared with "clean"


@dataclass(frozen=True)
class Size:
    """The size of a run."""

    vocabulary: int = 2000
    words: int = 32  # of a sequence
    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 1200
    batch: int = 16
    start: int = 80  # steps before the first hypergradient: the model must know more than frequencies of words
    early: int = 24  # steps after these, each with hypergradients
    every: int = 0  # steps between two such steps later, 0: none
    repeats: int = 4  # hypergradients in each of them, on different batches
    summed: int = 32  # hypergradients for each step of the weights: one of them is mostly noise
    rate: float = 1.5  # of Adam at the start, for the weights of the sources
    bound: float = 2.0  # of the scores. Else the sources that help most at the moment take all the weight
    tracking: float = 0.1  # the learning rate of SGD for v
    outer_batch: int = 16
    held: int = 0  # validation sequences in use, 0: all


class Transformer(nn.Module):
    """A causal language model. The embedding is also the output layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Parameter(0.02 * torch.randn(size.words, size.width))
        self.blocks = nn.Sequential(*[Block(size.width, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.embed.weight, std=0.1)  # with 0.02, the loss stays on a plateau for 250 steps

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]]))
        return x @ self.embed.weight.T


class Block(nn.Module):
    """Attention by PyTorch's fused kernel, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.up, self.out, self.down):  # as in GPT-2: small steps of the residual stream
            nn.init.normal_(layer.weight, std=0.007 if layer in (self.out, self.down) else 0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(gelu(self.up(self.norms[1](x))))


@dataclass(frozen=True)
class Text:
    """Sequences of words as numbers. A source has its share of the training sequences."""

    train: Tensor  # (sequences, words + 1)
    before: Tensor  # the same without shuffling
    source: Tensor  # of each training sequence
    shuffled: np.ndarray  # whether each source is shuffled
    validation: Tensor
    test: Tensor


def read(folder: Path | None, size: Size, seed: int) -> Text:
    """Cut the text into sequences: a tenth for validation, a tenth for tests, the rest for eight sources."""
    _, first, second = data.words(folder)
    words = first + second
    known = [word for word, _ in Counter(words).most_common(size.vocabulary - 1)]
    index = {word: i + 1 for i, word in enumerate(known)}
    numbers = np.array([index.get(word, 0) for word in words])
    length = size.words + 1
    sequences = numbers[: len(numbers) // length * length].reshape(-1, length)
    rng = np.random.default_rng(seed)
    held = len(sequences) // 10
    # Whole blocks of text are held out, so that no sequence continues in another part.
    test, validation, train = np.split(sequences, [held, 2 * held])
    source = np.arange(len(train)) * SOURCES // len(train)
    shuffled = np.isin(np.arange(SOURCES), rng.permutation(SOURCES)[: SOURCES // 2])
    mixed = np.where(shuffled[source][:, None], rng.permuted(train, axis=1), train)
    validation = validation[: size.held or None]
    mixed, train, source, validation, test = map(torch.tensor, (mixed, train, source, validation, test))
    return Text(mixed, train, source, shuffled, validation, test)


def losses(net: nn.Module, sequences: Tensor, bfloat16: bool = False) -> Tensor:
    """Return the mean loss of each sequence."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = net(sequences[:, :-1])
    return cross_entropy(logits.float().transpose(1, 2), sequences[:, 1:], reduction="none").mean(1)


@dataclass(frozen=True)
class Trained:
    """A network after training, the weights of the sources, and CPU seconds."""

    net: Transformer
    weights: DataWeights
    seconds: float
    path: list[list[float]]  # the scores after each of their steps


def batches(
    method: str, text: Text, size: Size, weights: DataWeights, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
    """Yield the numbers of sequences, and a function that returns the factors of their losses."""
    if method == "sampled":
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        sampler = WeightedSampler(weights, text.source, 4 * size.batch, uniform=0.05, generator=generator)
        while True:
            for rows in torch.tensor(list(sampler)).split(size.batch):
                yield rows, partial(sampler.loss_weights, rows)
    usable = np.flatnonzero(~text.shuffled[text.source]) if method == "clean" else np.arange(len(text.train))
    while True:
        rows = torch.tensor(rng.choice(usable, size.batch))
        yield rows, partial(weights, text.source[rows])


def train(
    method: str,
    text: Text,
    size: Size,
    seed: int,
    compiled: bool = False,
    bfloat16: bool = False,
    weights: DataWeights | None = None,
) -> Trained:
    """Train a network, with fixed weights if they are given."""
    torch.manual_seed(seed)
    net, tuned = Transformer(size), weights is None and method not in ("uniform", "clean")
    model: Any = torch.compile(net, fullgraph=True) if compiled else net
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    weights = weights or DataWeights(SOURCES)
    outer_optimizer = torch.optim.Adam(weights.parameters(), size.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, size.steps)
    first_order = bilevel_torch.FirstOrder(
        net,
        weights.parameters(),
        optimizer=partial(torch.optim.SGD, lr=size.tracking, weight_decay=1e-2) if method == "tracked" else None,
        preconditioner=optimizer if method in ("sama", "sampled") else None,
    )
    rng = np.random.default_rng(seed)
    drawn = batches(method, text, size, weights, rng)
    began, calls, path = time.process_time(), 0, []

    def losses_on_batches() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Draw batches, and return the functions for both losses on them."""
        rows, factors = next(drawn)
        others = text.validation[torch.tensor(rng.choice(len(text.validation), size.outer_batch))]

        def inner(sequences: Tensor = text.train[rows], factors: Callable[[], Tensor] = factors) -> Tensor:
            return (factors() * losses(model, sequences, bfloat16)).mean()

        def outer(sequences: Tensor = others) -> Tensor:
            return losses(model, sequences, bfloat16).mean()

        return inner, outer

    for step in range(size.steps):
        if step == 10:  # compiled, and in caches
            began = time.process_time()
        inner, outer = losses_on_batches()
        torch.autograd.backward(inner(), inputs=list(net.parameters()))  # the .grad of the weights is a sum
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the hypergradient does not find gradients that it must keep
        due = step < size.start + size.early or (size.every and (step + 1) % size.every == 0)
        for number in range(size.repeats if tuned and step >= size.start and due else 0):
            first_order.backward(*((inner, outer) if number == 0 else losses_on_batches()))
            calls += 1
            if calls % size.summed == 0:
                outer_optimizer.param_groups[0]["lr"] = size.rate * optimizer.param_groups[0]["lr"] / RATE  # falls too
                outer_optimizer.step()
                outer_optimizer.zero_grad()
                with torch.no_grad():
                    for scores in weights.parameters():
                        scores.clamp_(-size.bound, size.bound)
                path.append(next(weights.parameters()).tolist())
        schedule.step()
    return Trained(net, weights, time.process_time() - began, path)


def auc(w: np.ndarray, shuffled: np.ndarray) -> float:
    """Return how often a clean source has more weight than a shuffled one."""
    good, bad = w[~shuffled], w[shuffled]
    return float(np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)))


@torch.no_grad()
def mean_loss(net: nn.Module, sequences: Tensor) -> float:
    """Return the mean loss of sequences."""
    return float(torch.cat([losses(net, part) for part in sequences.split(64)]).mean())


def peak(function: Callable[[], object]) -> float:
    """Return the largest total size of the tensors on the CPU that a function allocates, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text("utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]") / 2**20


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def run(
    method: str,
    folder: Path | None,
    size: Size,
    seed: int,
    compiled: bool,
    bfloat16: bool,
    again: bool = False,
    memory: bool = True,
) -> dict[str, Any]:
    """Train, and return the measurements. Then perhaps train again with the weights found."""
    torch.set_num_threads(1)
    text = read(folder, size, seed)
    trained = train(method, text, size, seed, compiled, bfloat16)
    w = trained.weights().detach().numpy()
    short = replace(size, steps=4, start=2, early=2)
    measured: dict[str, Any] = {
        "auc": auc(w, text.shuffled),
        "weight of the clean half": float(w[~text.shuffled].sum() / w.sum()),
        "validation loss": mean_loss(trained.net, text.validation),
        "test loss": mean_loss(trained.net, text.test),
        "CPU seconds": trained.seconds,
        "path": trained.path,
        "weights": sum(p.numel() for p in trained.net.parameters()),
    }
    if memory:  # sizes do not depend on the seed
        measured["MiB"] = peak(lambda: train(method, text, short, seed, compiled, bfloat16))
    if again and trained.path:
        fixed = "sampled" if method == "sampled" else "uniform"
        net = train(fixed, text, size, seed, compiled, bfloat16, weights=trained.weights).net
        measured["validation loss again"] = mean_loss(net, text.validation)
        measured["test loss again"] = mean_loss(net, text.test)
    return measured


def medians(runs: dict[str, list[dict[str, float]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each method, and the medians of its measurements with their ranges. Add ratios to "clean" by seed."""
    for method, found in runs.items():
        columns = {name: [run[name] for run in found if name in run] for name in found[0]}
        if "clean" in runs and method != "clean":
            for name in RATIOS:
                columns[f"{name} / clean"] = [
                    a[name] / b[name] for a, b in zip(found, runs["clean"], strict=True) if name in a
                ]
        yield method, {k: f"{np.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for k, v in columns.items()}


def main(argv: list[str] | None = None) -> None:
    """Print a line for each run, and then medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has wikitext2_validtest/")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--again", action="store_true")
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(argv)
    size = replace(Size(), **{name: getattr(options, name) for name in asdict(Size())})
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for method in options.methods:
            # The peak memory belongs to a process, so each run has its own.
            first = seed == options.first_seed
            found = apart(
                run, method, options.data, size, seed, options.compile, options.bfloat16, options.again, first
            )
            found.pop("path")
            print(f"{method:>14} seed {seed}:", {k: round(v, 3) for k, v in found.items()}, flush=True)
            runs[method].append(found)
    for method, found in medians(runs):
        print(f"{method:>14} medians:", found)


if __name__ == "__main__":
    main()
