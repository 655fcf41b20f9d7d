"""Training with hyperparameters tuned on the way, in PyTorch: what it costs, and what it gains."""

import gzip
import random
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
from benchmarks.speed.measure import interleave, peak_memory, quartiles
from benchmarks.speed.torch_workloads import penalty

INNER_STEPS = 10  # for each outer step
BATCH = 256
NOTHING = "no outer step"
Data = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Data, Data]:
    """Return training and validation data of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return _split(np.asarray(x)[order] / 16, np.asarray(y)[order], 300, 1400)


def mnist(folder: str) -> tuple[Data, Data]:
    """Return training and validation data from idx files, as they are or compressed by gzip."""

    def read(pattern: str) -> np.ndarray:
        found = sorted(p for p in Path(folder).glob(pattern) if "approx" not in p.name)
        if not found:
            raise FileNotFoundError(f"{folder} has no file {pattern}: MNIST's idx files, as they are or with .gz.")
        raw = found[0].read_bytes()
        raw = gzip.decompress(raw) if found[0].suffix == ".gz" else raw
        start = 4 + 4 * raw[3]
        return np.frombuffer(raw, np.uint8, offset=start)

    x, y = read("train*images*"), read("train*labels*")
    return _split(x.reshape(-1, 784) / 255, y, 1000, 5000)


def _split(x: np.ndarray, y: np.ndarray, train: int, val: int) -> tuple[Data, Data]:
    inputs, labels = torch.tensor(x[: train + val], dtype=torch.float32), torch.tensor(y[: train + val].astype(int))
    return (inputs[:train], labels[:train]), (inputs[train:], labels[train:])


class Run:
    """A network in training, with a decay per weight."""

    def __init__(self, train: Data, val: Data, hidden: list[int], outer_rate: float = 0.1) -> None:
        torch.manual_seed(0)
        widths = [train[0].shape[1], *hidden]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        self.train, self.val = train, val
        self.log_decays = [torch.full_like(p, np.log(1e-4)).requires_grad_() for p in self.net.parameters()]
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.outer_optimizer = torch.optim.Adam(self.log_decays, outer_rate)
        self.batches = torch.Generator().manual_seed(0)

    def batch(self, data: Data) -> Data:
        """Draw a batch."""
        chosen = torch.randint(len(data[0]), (BATCH,), generator=self.batches)
        return data[0][chosen], data[1][chosen]

    def inner_loss(self, constant: bool = False) -> torch.Tensor:
        """Return L on a batch."""
        x, y = self.batch(self.train)
        decays = [h.detach() for h in self.log_decays] if constant else self.log_decays
        return cross_entropy(self.net(x), y) + penalty(list(self.net.parameters()), decays)

    def steps(self, count: int, constant: bool = False) -> None:
        """Train."""
        for _ in range(count):
            self.optimizer.zero_grad()
            self.inner_loss(constant).backward()
            self.optimizer.step()

    def outer_step(self, solver: Any = None) -> bl.Hypergradient:
        """Tune; with the default solver if there is none."""
        self.outer_optimizer.zero_grad()
        x, y = self.batch(self.val)
        options = {} if solver is None else {"solver": solver}
        hg = bilevel_torch.backward(
            self.inner_loss(), cross_entropy(self.net(x), y), self.net.parameters(), self.log_decays,
            on_failure="ignore", **options,
        )  # fmt: skip
        self.outer_optimizer.step()
        return hg

    def val_loss(self) -> float:
        """Return the loss on all validation data."""
        with torch.no_grad():
            return cross_entropy(self.net(self.val[0]), self.val[1]).item()


def _joint_columns() -> dict[str, Any]:
    return {
        "standard": NOTHING,
        "joint": None,
        'joint, solver="neumann"': "neumann",
        "joint, WarmStart with its defaults": bl.WarmStart(),
        "joint, WarmStart, CG of 2 steps": bl.WarmStart({"name": "cg", "maxiter": 2, "rtol": 0.0, "damping": 0.1}),
    }


def _cycle(run: Run, solver: Any, taken: list[int]) -> Callable[[], None]:
    def cycle() -> None:
        run.steps(INNER_STEPS, constant=solver == NOTHING)
        if solver != NOTHING:
            taken.append(int(run.outer_step(solver).info.steps))

    return cycle


def _hidden(spec: dict[str, Any]) -> list[int]:
    return [16, 16] if spec["quick"] else [950, 950]


def joint(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the time of ten training steps and an outer step, against that of the ten alone."""
    start = Run(*digits(), _hidden(spec))
    start.steps(2 if spec["quick"] else 100)
    taken: dict[str, list[int]] = {name: [] for name in _joint_columns()}
    cycles = {name: _cycle(deepcopy(start), solver, taken[name]) for name, solver in _joint_columns().items()}
    for cycle in cycles.values():
        cycle()
    seconds = interleave(cycles, spec["budget"])
    ratios = {name: quartiles(np.asarray(s) / np.asarray(seconds["standard"])) for name, s in seconds.items()}
    yield {
        "kind": "joint", "weights": sum(p.numel() for p in start.net.parameters()),
        "columns": {
            name: {"seconds": quartiles(values), "ratio": ratios[name], "rounds": len(values)}
            | ({"products": quartiles(taken[name])} if taken[name] else {})
            for name, values in seconds.items()
        },
    }  # fmt: skip


def joint_memory(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the peak memory of training, optimizer states and hyperparameters included, but not the weights."""
    data = digits()
    run = Run(*data, _hidden(spec))
    cycle = _cycle(run, _joint_columns()[spec["column"]], [])
    warm_up = Run(*data, [8])
    yield {
        "kind": "joint memory", "column": spec["column"],
        "bytes": peak_memory(lambda: warm_up.steps(1), lambda: (cycle(), cycle())),
    }  # fmt: skip


def _amortised_columns() -> dict[str, Any]:
    system = {"damping": 0.1}
    return {
        "no tuning": NOTHING,
        "20 products": bl.CG(maxiter=20, rtol=0.0, **system),
        "1 product, warm": bl.WarmStart(bl.CG(maxiter=1, rtol=0.0, **system)),
        "2 products, warm": bl.WarmStart(bl.CG(maxiter=2, rtol=0.0, **system)),
    }


def amortised(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what an outer step costs in plain steps, and how soon each run reaches the loss that 20 products reach.

    The runs take turns, in a new order at each outer step; a run's clock stands still while others run.
    """
    for name, data in {"digits": digits, **({"MNIST": lambda: mnist(spec["data"])} if spec["data"] else {})}.items():
        train, val = data()
        runs = {name: Run(train, val, [16] if spec["quick"] else [256]) for name in _amortised_columns()}
        solvers, order, rng = _amortised_columns(), list(runs), random.Random(0)
        times = {name: {"inner": [], "outer": [], "loss": []} for name in runs}
        for _ in range(3 if spec["quick"] else 150):
            rng.shuffle(order)
            for column in order:
                run, record = runs[column], times[column]
                start = time.perf_counter()
                run.steps(INNER_STEPS)
                middle = time.perf_counter()
                if solvers[column] != NOTHING:
                    run.outer_step(solvers[column])
                end = time.perf_counter()
                record["inner"].append(middle - start)
                record["outer"].append(end - middle)
                record["loss"].append(run.val_loss())
        yield {"kind": "amortised", "data": name, "columns": _reached(times)}


def _reached(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return for each run when it had what the one with 20 products had at its best."""
    goal = min(times["20 products"]["loss"])
    result = {}
    for name, record in times.items():
        inner, outer = np.asarray(record["inner"]), np.asarray(record["outer"])
        clock = np.cumsum(inner + outer)
        there = np.flatnonzero(np.asarray(record["loss"]) <= goal)
        result[name] = {
            "plain_steps": quartiles(outer / (inner / INNER_STEPS)), "best_loss": round(min(record["loss"]), 4),
            "seconds_to_goal": round(float(clock[there[0]]), 3) if len(there) else None,
        }  # fmt: skip
    return result
