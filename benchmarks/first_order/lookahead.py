"""Compare the time of one-step hypergradients with higher, TorchOpt and Betty.

The task is the Meta-Weight-Net of `examples/pytorch/meta_weight_net.py`, with plain SGD. "by hand" differentiates one
step with `torch.func.functional_call`. Printed for each column: its CPU time as a multiple of "by hand" (median and
quartiles over interleaved rounds), and the cosine to it. `FirstOrder` and Betty's "darts" take differences of
gradients. Libraries that are not installed are left out.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.lookahead [--data DIR] [--rounds 100]
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[2] / "examples" / "pytorch"))
import meta_weight_net

import bilevel_torch

Columns = dict[str, Callable[[], list[Tensor]]]


def columns(loop: Any, batch: Any, clean: Any) -> Columns:
    """Return functions that return the hypergradient."""
    hparams = dict(loop.weights.named_parameters())
    loop.optimizer = torch.optim.SGD(loop.net.parameters(), meta_weight_net.RATE)
    loop.step = bilevel_torch.TrainingStep(loop.net, loop.optimizer, loop.weighted)

    def ours(method: Callable[[Any, Any], object]) -> list[Tensor]:
        method(batch, clean)
        return [w.grad.clone() for w in hparams.values()]

    def pull(net: Any) -> list[Tensor]:
        return list(torch.autograd.grad(cross_entropy(net(clean[0]), clean[1]), list(hparams.values())))

    def by_hand() -> list[Tensor]:
        weights = dict(loop.net.named_parameters())
        gradients = torch.autograd.grad(loop.inner(batch), list(weights.values()), create_graph=True)
        moved = {n: w - meta_weight_net.RATE * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
        return pull(lambda x: functional_call(loop.net, moved, (x,)))

    def with_higher() -> list[Tensor]:
        import higher

        with higher.innerloop_ctx(loop.net, loop.optimizer) as (net, steps):
            steps.step(loop.weighted(net, hparams, batch))
            return pull(net)

    def with_torchopt() -> list[Tensor]:
        import torchopt

        before = torchopt.extract_state_dict(loop.net, by="reference")
        try:
            torchopt.MetaSGD(loop.net, lr=meta_weight_net.RATE).step(loop.inner(batch))
            return pull(loop.net)
        finally:
            torchopt.recover_state_dict(loop.net, before)

    def with_betty() -> list[Tensor]:
        from betty.configs import Config
        from betty.hypergradient.darts import darts

        weights = list(loop.net.parameters())
        before = [w.detach().clone() for w in weights]  # since it leaves the weights a step away
        inner = SimpleNamespace(
            cur_batch=batch, training_step_exec=loop.inner, config=Config(), trainable_parameters=lambda: weights
        )
        vector = torch.autograd.grad(loop.outer(clean), weights)
        found = darts(vector, inner, SimpleNamespace(trainable_parameters=lambda: list(hparams.values())))
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
        return found

    found: Columns = {
        "by hand": by_hand,
        "TrainingStep": lambda: ours(loop.one_step),
        "FirstOrder": lambda: ours(loop.by_gradients),
    }
    peers = {"higher": with_higher, "torchopt": with_torchopt, "betty": with_betty}
    return found | {name: column for name, column in peers.items() if find_spec(name)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print a line for each column, and return the cosines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has mnist/; without it, small digits")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    noisy, _, held, _ = meta_weight_net.read(options.data, 0)
    loop = meta_weight_net.Loop("one step", noisy[0].shape[1])
    loop.train(noisy, held, 50, 0)
    of = columns(loop, *((x[:100], y[:100]) for x, y in (noisy, held)))
    answers = {name: torch.cat([g.ravel() for g in column()]) for name, column in of.items()}
    seconds: dict[str, list[float]] = {name: [] for name in of}
    for _ in range(options.rounds):
        for name, column in of.items():
            began = time.process_time()
            column()
            seconds[name].append(time.process_time() - began)
    base = float(np.median(seconds["by hand"]))
    print(f"by hand: {1000 * base:.2f} ms")
    cosines = {}
    for name, values in seconds.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) / base
        cosines[name] = float(torch.cosine_similarity(answers[name], answers["by hand"], 0))
        print(f"{name:<14}{middle:6.2f} ({low:.2f} – {high:.2f})   cosine {cosines[name]:.4f}")
    return cosines


if __name__ == "__main__":
    main()
