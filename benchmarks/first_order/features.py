"""Tune a penalty for each of the 123 features of a9a by gradients only.

First, errors of one hypergradient against gradients of L, at the optimum for random penalties: CG by finite
differences and the penalty method that minimizes L ± δ c·y by descent, by momentum and by Adam. Then the race of
examples/paper/successors.py, with its step sizes: 200 steps of Adam on the penalties, with 20 steps of gradient descent
between them. `FirstOrder` tracks v by 20 steps with momentum. Printed are the validation losses at the optimum for the
penalties found, minus the best loss of L-BFGS on exact hypergradients, and gradients per step of the descent.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.features --data DIR
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl
import bilevel_torch
from bilevel.methods.optimizers import Adam, HeavyBall
from bilevel_numpy import NumpySpace

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
from successors import BOUNDS, CG, INNER_STEPS, OUTER_RATE, PROBLEM, START, Data, Method, loop, optimum, search, split

STEPS = 200
MOMENTUM = 0.9


class Counting:
    """The inner objective with first derivatives only, which it counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        return PROBLEM.inner(*args)

    def grad(self, *args: Any) -> Any:
        """Return ∂L/∂w."""
        self.count += 1
        return PROBLEM.inner.grad(*args)

    def grad_hparams(self, w: np.ndarray, hparams: np.ndarray, *args: Any) -> np.ndarray:
        """Return ∂L/∂λ."""
        self.count += 1
        return 0.5 * np.exp(hparams) * w**2


def errors(data: Data) -> Iterator[tuple[str, int, float]]:
    """Yield the method, the number of gradients, and the relative error of the hypergradient."""
    hparams = np.random.default_rng(0).uniform(-6, -2, data.train[0].shape[1])
    w = optimum(hparams, np.zeros_like(hparams), *data.train)
    args = {"inner_args": data.train, "outer_args": data.validation}
    exact = bl.hypergradient(PROBLEM, w, hparams, solver="exact", **args).grad
    c = PROBLEM.outer.grad(w, hparams, *data.validation)[0]
    step_size = bl.prepare("neumann", PROBLEM, w, hparams, inner_args=data.train).state
    for terms in (3, 10, 30, 100):
        inner = Counting()
        problem = bl.Problem(inner, PROBLEM.outer, curvature="finite-differences")
        solver = bl.CG(maxiter=terms, rtol=None)
        grad = bl.hypergradient(problem, w, hparams, solver=solver, on_failure="ignore", **args).grad
        yield "cg", inner.count, float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))
    space, penalty = NumpySpace(w), 1e-3 / np.linalg.norm(c)
    optimizers = {
        "descent": HeavyBall(space, step_size, 0.0),
        "momentum": HeavyBall(space, step_size, MOMENTUM),
        "adam": Adam(space, 1e-3, 0.9, 0.999, 1e-8),
    }
    for name, optimizer in optimizers.items():
        for steps in (10, 30, 100, 300):
            inner, ends = Counting(), []
            for sign in (1, -1):
                y, state = w, optimizer.init(w)
                for _ in range(steps):
                    y, state = optimizer.step(inner.grad(y, hparams, *data.train) + sign * penalty * c, y, state)
                ends.append(inner.grad_hparams(y, hparams))
            grad = (ends[0] - ends[1]) / (2 * penalty)
            yield f"penalty, {name}", inner.count, float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))


class Model(nn.Module):
    """A linear model of dense features, in float64."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def first_order(data: Data, steps: int) -> tuple[np.ndarray, float]:
    """Return the penalties of the last hypergradient, and the gradients per step of the descent."""
    train, validation = (
        (torch.from_numpy(X.toarray()), torch.from_numpy(y.astype(float))) for X, y in (data.train, data.validation)
    )
    net, hparams = Model(train[0].shape[1]), torch.full((train[0].shape[1],), START, dtype=torch.float64)
    hparams.requires_grad_()
    most = np.full(len(hparams), BOUNDS[1])
    step_size = float(bl.prepare("neumann", PROBLEM, 0 * most, most, inner_args=data.train).state)
    count = 0

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return binary_cross_entropy_with_logits(net(x), y)

    def inner() -> torch.Tensor:
        return loss(*train) + 0.5 * (hparams.exp() * net.weight**2).sum()

    track = partial(torch.optim.SGD, lr=step_size, momentum=MOMENTUM)
    method = bilevel_torch.FirstOrder(net, hparams, optimizer=track, steps=INNER_STEPS)
    descent = torch.optim.SGD(net.parameters(), step_size)
    adam = torch.optim.Adam([hparams], OUTER_RATE, eps=1e-12)
    at = hparams.detach().numpy().copy()
    for step in range(1, steps + 1):
        for _ in range(INNER_STEPS):
            descent.zero_grad()
            inner().backward()
            descent.step()
        at = hparams.detach().numpy().copy()
        method.backward(inner, lambda: loss(*validation), accumulate=False)
        adam.param_groups[0]["lr"] = OUTER_RATE * (1 - step / steps)
        adam.step()
        with torch.no_grad():
            hparams.clamp_(*BOUNDS)
    return at, count / (steps * INNER_STEPS)


def main(argv: list[str] | None = None) -> None:
    """Print the errors, and the excess losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has a9a/; without it, a small stand-in")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, gradients, error in errors(split(options.data, 0)):
        print(f"{name:>18}: {gradients:>4} gradients, error {error:.1e}", flush=True)
    for seed in range(options.seeds):
        data = split(options.data, seed)
        sizes = {"steps": options.steps, "judged": 8, "iterations": 40}

        def judged(hparams: np.ndarray, data: Data = data) -> float:
            return float(
                PROBLEM.outer(optimum(hparams, np.zeros_like(hparams), *data.train), hparams, *data.validation)
            )

        best = min(judged(at) for _, at, _ in search("reference", data, sizes))
        at, gradients = first_order(data, options.steps)
        print(f"seed {seed}: first order {judged(at) - best:.1e}, {gradients:.2f} gradients a step", flush=True)
        for name, method in {"f2sa": Method(INNER_STEPS, None), "cg": Method(INNER_STEPS, CG)}.items():
            _, at, _ = loop(name, method, data, sizes)[-1]
            print(f"seed {seed}: {name} {judged(at) - best:.1e}", flush=True)


if __name__ == "__main__":
    main()
