"""How well metagradients predict the losses of a transformer on WikiText-2 after training without some of its text.

python -m benchmarks.metagradients.language --data DIR

DIR is the folder of `examples/paper/data.py`. The training examples are chunks of text, with a weight each. The truth
is the linear datamodeling score: the rank correlation of predicted and actual losses of 20 chunks of other text, over
trainings without 5 % of the examples.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, layer_norm

import bilevel as bl
import bilevel_torch
from benchmarks.attribution.lds import left_out, score
from bilevel.diagnosis.training_report import TrainingDiagnosis

SEED = 0
Weights = dict[str, torch.Tensor]


class Sizes(NamedTuple):
    """Sizes of a run.

    Attributes:
        examples: the number of chunks to train on.
        words: the number of words of a chunk.
        vocabulary: the number of words that the model tells apart. Others are one word.
        width: the size of the embedding.
        steps: T.
        batch: the number of chunks of a batch.
        rate: the largest learning rate.
        queries: the number of chunks whose losses are predicted.
        runs: the number of trainings without some examples.
    """

    examples: int = 320
    words: int = 12
    vocabulary: int = 300
    width: int = 32
    steps: int = 240
    batch: int = 32
    rate: float = 3e-3
    queries: int = 20
    runs: int = 40


class Block(nn.Module):
    """Causal attention with 4 heads and a feed-forward layer, each after a normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1:]
        q, k, v = (a.unflatten(-1, (4, -1)).transpose(1, 2) for a in self.first(layer_norm(x, size)).chunk(3, -1))
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9)
        x = x + self.second((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(layer_norm(x, size))))


class Transformer(nn.Module):
    """Two blocks. The embedding of words is the last layer, too."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Parameter(torch.zeros(sizes.words, sizes.width))
        self.blocks = nn.Sequential(Block(sizes.width), Block(sizes.width))
        nn.init.normal_(self.embedding.weight, std=sizes.width**-0.5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.embedding(words) + self.places)
        return layer_norm(x, x.shape[-1:]) @ self.embedding.weight.T


def of_chunks(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each chunk."""
    return cross_entropy(logits.transpose(1, 2), words, reduction="none").mean(1)


def chunks(folder: Path, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return chunks to train on, and the chunks of the queries, of shape (n, words + 1)."""
    files = (folder / "wikitext2_validtest" / name for name in ("valid.txt", "test.txt"))
    texts = [file.read_text("utf-8").replace("\n", " <eos> ").split() for file in files]
    length = sizes.words + 1
    parts = [text[: n * length] for text, n in zip(texts, (sizes.examples, sizes.queries), strict=True)]
    common = [word for word, _ in Counter(parts[0]).most_common(sizes.vocabulary - 1)]
    numbers = {word: number for number, word in enumerate(common, start=1)}
    encoded = [torch.tensor([numbers.get(word, 0) for word in part]).reshape(-1, length) for part in parts]
    return encoded[0], encoded[1]


class Language:
    """A run with a weight for each example, and its queries."""

    def __init__(self, examples: torch.Tensor, queries: torch.Tensor, sizes: Sizes) -> None:
        torch.manual_seed(SEED)
        self.examples, self.queries, self.sizes = examples, queries, sizes
        self.model = Transformer(sizes)
        optimizer = torch.optim.AdamW(self.model.parameters(), sizes.rate, betas=(0.9, 0.99), weight_decay=0.01)
        warmup = sizes.steps // 10
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: min((t + 1) / warmup, (sizes.steps - t) / (sizes.steps - warmup))
        )
        self.step = bilevel_torch.TrainingStep(self.model, optimizer, self.loss, scheduler=rate, clip_norm=1.0)
        self.state = self.step.init()
        rows = (torch.randperm(sizes.examples) for _ in range(sizes.steps))
        self.batches = [(examples[i[: sizes.batch]], i[: sizes.batch]) for i in rows]
        self.weights = torch.ones(sizes.examples)

    def loss(self, model: Any, weights: torch.Tensor, batch: Any) -> torch.Tensor:
        words, rows = batch
        return (weights[rows] * of_chunks(model(words[:, :-1]), words[:, 1:])).mean()

    def outer(self, state: Any, weights: torch.Tensor) -> torch.Tensor:
        """Return the losses of the queries."""
        return of_chunks(self.step.evaluate(state, lambda model: model(self.queries[:, :-1])), self.queries[:, 1:])

    @torch.no_grad()
    def train(self, weights: torch.Tensor) -> Any:
        state = self.state
        for batch in self.batches:
            state = self.step(state, weights, batch)
        return state

    def logits(self, params: Weights, words: torch.Tensor) -> torch.Tensor:
        return functional_call(self.model, params, (words[:, :-1],))

    def hypergradients(self, params: Weights) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield solvers by name, with functions that return the gradients at the end of a run."""
        target = self.examples[:, 1:]

        def outer(params: Weights, weights: torch.Tensor) -> torch.Tensor:
            return of_chunks(self.logits(params, self.queries), self.queries[:, 1:])

        def model(params: Weights, weights: torch.Tensor, words: torch.Tensor) -> Any:
            return self.logits(params, words), weights

        def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
            return (output[1] * of_chunks(output[0], target)).mean()

        args = (self.examples, target)
        solvers = {
            'CG, damping "auto"': ("hessian", bl.CG(maxiter=20, rtol=1e-2)),
            "Gauss-Newton CG": ("gauss-newton", bl.CG(maxiter=20, rtol=1e-2)),
            "Gauss-Newton CG, damping 0.1": ("gauss-newton", bl.CG(maxiter=20, rtol=1e-2, damping=0.1)),
            "identity": ("hessian", "identity"),
        }
        for name, (curvature, solver) in solvers.items():
            problem = bl.Problem.from_model(model, loss, outer, curvature=curvature)
            yield (
                name,
                lambda problem=problem, solver=solver: bl.hypergradients(
                    problem, params, self.weights, inner_args=args, solver=solver, on_failure="ignore"
                ),
            )


def rows(language: Language) -> tuple[list[tuple[str, float, float]], TrainingDiagnosis]:
    """Return the method, the score and the seconds of each row, and the report on the run."""
    sizes = language.sizes
    weights = left_out(sizes.runs, sizes.examples, SEED).astype(np.float32)
    actual = torch.stack([language.outer(language.train(torch.as_tensor(row)), row) for row in weights]).numpy()

    def scored(hg: Any) -> float:
        return score(hg.grad.double().numpy(), weights, actual)

    training = bl.Training(language.step, language.outer)
    start = time.perf_counter()
    report = bl.diagnose_training(training, language.state, language.weights, language.batches)
    found = [("metagradient, with its report", scored(report.metagradient), time.perf_counter() - start)]
    for name, function in language.hypergradients(report.metagradient.state.params):
        start = time.perf_counter()
        hg = function()
        found.append((name, scored(hg), time.perf_counter() - start))
        print(f"{name}: {hg.info.steps.mean():.0f} products, damping {hg.info.damping.mean():.3g}", flush=True)
    return found, report


def main(argv: list[str] | None = None) -> list[tuple[str, float, float]]:
    """Print a Markdown table and the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with wikitext2_validtest/")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} unless given")
    given = vars(parser.parse_args(argv))
    torch.set_num_threads(1)
    sizes = Sizes(**{name: given[name] for name in Sizes._fields})
    language = Language(*chunks(given["data"], sizes), sizes)
    found, report = rows(language)
    print("| method | LDS | seconds |\n|---|---|---|")
    for name, lds, seconds in found:
        print(f"| {name} | {lds:.3f} | {seconds:.1f} |")
    print(f"\n{report}")
    return found


if __name__ == "__main__":
    main()
