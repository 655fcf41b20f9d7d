"""What a hypergradient costs: time in training gradients, memory in multiples of plain training, for 1.8 million λ.

    python examples/paper/cost.py --data DIR

The paper's claim is "only a few times more costly in memory and compute than standard training". Here a decay per
weight of an MLP, 784-1000-1000-10: one hypergradient by K products, which should take some 2 + 1.1 K training gradients
in memory that does not depend on K; unrolled through T steps, whose memory grows with T; and the whole of algorithm 1,
five training steps for each step of the hyperparameters, against the training steps alone. Seconds are those of the
processor, so that what else runs on the machine matters little. Memory is the peak of a process of its own, whose
allocator gives back what is freed.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
import data
from runs import options, show, stored, variants

STEP_SIZE = 0.1  # of the Neumann series: time and memory do not depend on it
TRAINING_STEPS = 5  # for each step of the hyperparameters
SOLVERS: dict[str, Any] = {
    "identity": {"name": "identity"},
    **{f"neumann {k}": {"name": "neumann", "terms": k, "step_size": STEP_SIZE} for k in (1, 3, 5, 20)},
    "cg 20": {"name": "cg", "maxiter": 20, "rtol": 0.0, "damping": 1.0},
    **{f"unrolled {t}": {"name": "unrolled", "steps": t, "step_size": 1e-3} for t in (1, 5, 20)},
}
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}  # to glibc's malloc
FULL, FAST = {"hidden": 1000, "batch": 256, "repeats": 7}, {"hidden": 32, "batch": 64, "repeats": 3}


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Measure each variant in a process of its own."""
    arguments = options(__doc__, argv, seeds=1)
    sizes = FAST if arguments.fast else FULL
    histories = {}
    for name, solver in variants(arguments, SOLVERS).items():
        settings = sizes | {"solver": solver, "data": data.mnist(arguments.data).name}
        histories[name] = stored(
            arguments, "cost", name.replace(" ", "-"), settings,
            lambda _, solver=solver: cost(arguments.data, sizes, bl.get_solver(solver)),
        )  # fmt: skip
    show(histories)
    return histories


def cost(*given: Any) -> dict:
    """Return the history of a measurement: times of one process, and the memory of another."""
    history, frugal = alone(measure, {}, *given), alone(measure, FRUGAL, *given)
    history["result"]["joint / training, memory"] = frugal["result"]["joint / training, memory"]
    return history


def alone(function: Callable[..., dict], environment: dict[str, str], *given: Any) -> dict:
    """Call a function in a new process."""
    before = dict(os.environ)
    os.environ |= environment
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *given).result()
    finally:
        for name in environment:
            del os.environ[name]
        os.environ |= before


def measure(folder: Path | None, sizes: dict[str, int], solver: Any) -> dict:
    """Return the cost of hypergradients and of algorithm 1 over that of gradients and of training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = data.mnist(folder).train
    x, x_val = (torch.as_tensor(part).flatten(1) for part in np.split(images.x[: 2 * sizes["batch"]], 2))
    y, y_val = (torch.as_tensor(part) for part in np.split(images.y[: 2 * sizes["batch"]], 2))
    widths = [x.shape[1], sizes["hidden"], sizes["hidden"], 10]
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    params = dict(net.named_parameters())
    decays = {name: torch.full_like(w, -7.0, requires_grad=True) for name, w in params.items()}
    optimizer, outer_optimizer = torch.optim.Adam(params.values(), 1e-3), torch.optim.Adam(decays.values(), 1e-2)
    constants = {name: d.detach() for name, d in decays.items()}

    def inner(params: dict, decays: dict) -> torch.Tensor:
        penalty = sum((decays[name].exp() * w**2).sum() for name, w in params.items())
        return cross_entropy(functional_call(net, params, (x,)), y) + penalty

    def outer(params: dict, decays: dict) -> torch.Tensor:
        return cross_entropy(functional_call(net, params, (x_val,)), y_val)

    problem = bl.Problem(inner, outer)

    def hypergradient() -> Any:
        if isinstance(solver, bl.Unrolled):  # it evaluates the losses at other weights, so it takes functions
            return bl.hypergradient(problem, params, decays, solver=solver, on_failure="ignore").grad
        losses = inner(params, decays), outer(params, decays)
        return bilevel_torch.hypergradient(*losses, params, decays, solver=solver, on_failure="ignore").grad

    def gradient() -> None:
        inner(params, constants).backward()
        net.zero_grad()

    def training() -> None:
        for _ in range(TRAINING_STEPS):
            inner(params, constants).backward()
            optimizer.step()
            optimizer.zero_grad()

    def joint() -> None:
        training()
        for name, h in hypergradient().items():
            decays[name].grad = h
        outer_optimizer.step()

    empty = peak()
    training()
    plain = max(peak() - empty, resource.getpagesize())  # a small model fits into what importing has taken and freed
    seconds: dict[str, list[float]] = {}
    for repeat in range(sizes["repeats"] + 1):
        for call in (gradient, hypergradient, training, joint):
            began = time.process_time()
            call()
            if repeat:  # the first warms up
                seconds.setdefault(call.__name__, []).append(time.process_time() - began)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    count = sum(d.numel() for d in decays.values())
    return {
        "rows": [],
        "cpu_seconds": round(sum(map(sum, seconds.values())), 2),
        "result": {
            "hyperparameters": count,
            "gradients": median["hypergradient"] / median["gradient"],
            "joint / training, time": median["joint"] / median["training"],
            "joint / training, memory": (peak() - empty) / plain,
        },
    }


def peak() -> int:
    """Return the most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
