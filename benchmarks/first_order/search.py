"""Compare `FirstOrder` with random search and successive halving. They search for weights of data.

The tasks are `cleaning` (a weight for each image) and `sources` (a weight for each of eight sources). A candidate has
random scores from a normal distribution, and the least validation loss wins. "random" trains each candidate to the end.
"halving" trains many candidates for a part of the steps, and the best of them longer (Jamieson & Talwalkar, AISTATS
2016; ASHA is its form for many workers). `cleaning` starts with eight candidates for an eighth of the steps, and trains
two for a quarter and one to the end. `sources` has fewer, for the CPU time of a run with hypergradients: four for an
eighth, and one to the end. "first order" tracks v in `cleaning`, and is "sampled" in `sources`, where searches also
draw by the weights. "equal weights" has scores of 0. Printed for each run: the test accuracy and the F1 score, or the
losses and the AUC, and CPU seconds. `sources` leaves compilation, the first ten steps of a training and the validation
losses out of them. Means over the seeds and their standard errors follow.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.search cleaning --data DIR [--trials 4] [--seeds 5]
    OMP_NUM_THREADS=1 python -m benchmarks.first_order.search sources --data DIR --trials 2 [--seeds 5] [--compile]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.first_order import cleaning, recipe, sources
from bilevel_torch.data import DataWeights

STEPS = 500  # of cleaning
Rungs = list[tuple[int, int]]  # candidates, and the divisor of the steps
RUNGS, FEWER = [(8, 8), (2, 4), (1, 1)], [(4, 8), (1, 1)]
METHODS = ["equal weights", "first order", "random", "halving"]
Trained = tuple[float, nn.Module, DataWeights]  # the validation loss first


def search(
    method: str,
    train: Callable[[DataWeights, int], Trained],
    number: int,
    trials: int,
    seed: int,
    rungs: Rungs = RUNGS,
) -> Trained:
    """Return the best candidate. ``train`` takes weights, and the part of the steps as a divisor."""
    generator = torch.Generator().manual_seed(seed)
    candidates = []
    for _ in range(trials if method == "random" else rungs[0][0]):
        candidates.append(DataWeights(number, "softmax" if number == sources.SOURCES else "sigmoid"))
        nn.init.normal_(candidates[-1].scores, generator=generator)
    if method == "random":
        return min((train(weights, 1) for weights in candidates), key=lambda found: found[0])
    found: list[Trained] = []
    for kept, part in rungs:
        found = sorted((train(weights, part) for weights in candidates[:kept]), key=lambda found: found[0])
        candidates = [weights for _, _, weights in found]
    return found[0]


def clean(method: str, folder: Path | None, steps: int, trials: int, seed: int) -> list[float]:
    """Return the test accuracy, the F1 score of labels called wrong, and CPU seconds."""
    of = cleaning.read(folder, seed)
    if method == "first order":
        return list(cleaning.run("tracked", "linear", of, steps * cleaning.COSTS["tracked"], seed))

    def train(weights: DataWeights, part: int) -> Trained:
        torch.manual_seed(seed)
        net = cleaning.network("linear", of.train[0].shape[1])
        recipe.train(net, of, steps // part, seed, lambda rows: weights(rows).detach(), lambda *_: None)
        loss = cleaning.errors(net, of.validation, torch.arange(len(of.validation[1]))).mean()
        return loss.item(), net, weights

    began = time.process_time()
    if method == "equal weights":
        _, net, weights = train(DataWeights(len(of.wrong), "sigmoid"), 1)
    else:
        _, net, weights = search(method, train, len(of.wrong), trials, seed)
    seconds = time.process_time() - began
    return [cleaning.accuracy(net, of.test), cleaning.f1_score(weights().detach() < 1, of.wrong), seconds]


def find(
    method: str, folder: Path | None, size: sources.Size, trials: int, seed: int, compiled: bool = False
) -> list[float]:
    """Return the validation loss, the test loss, the AUC of the weights, and CPU seconds."""
    text = sources.read(folder, size, seed)
    seconds = 0.0

    def train(weights: DataWeights | None, part: int = 1, form: str = "sampled") -> Trained:
        nonlocal seconds
        torch.compiler.reset()  # so that each candidate is compiled in the same way
        shorter = replace(size, steps=size.steps // part)
        trained = sources.train(form, text, shorter, seed, compiled, weights=weights)
        seconds += trained.seconds
        return sources.mean_loss(trained.net, text.validation), trained.net, trained.weights

    if method == "equal weights":
        loss, net, weights = train(None, form="uniform")
    elif method == "first order":
        loss, net, weights = train(None)
    else:
        loss, net, weights = search(method, train, sources.SOURCES, trials, seed, FEWER)
    auc = sources.auc(weights().detach().numpy(), text.shuffled)
    return [loss, sources.mean_loss(net, text.test), auc, seconds]


def main(argv: list[str] | None = None) -> None:
    """Print a line for each run and each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["cleaning", "sources"])
    parser.add_argument("--data", type=Path, help="the folder that has mnist/ and wikitext2_validtest/")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--trials", type=int, default=4, help="of random search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the network of sources")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    run: Any = partial(clean, steps=STEPS)
    if options.task == "sources":
        run = partial(find, size=sources.Size(), compiled=options.compile)
    for method in options.methods:
        runs = []
        for seed in range(options.seeds):
            runs.append(run(method, options.data, trials=options.trials, seed=seed))
            print(f"{method:<14}" + "".join(f"{x:>18.3f}" for x in runs[-1]) + f"   seed {seed}", flush=True)
        errors = np.std(runs, 0) / np.sqrt(max(options.seeds - 1, 1))
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(np.mean(runs, 0), errors, strict=True))
        print(f"{method:<14}" + "".join(f"{cell:>18}" for cell in cells) + "   mean", flush=True)


if __name__ == "__main__":
    main()
