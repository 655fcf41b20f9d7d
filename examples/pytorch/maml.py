"""Learn initial weights from which a few steps fit a new sine wave: MAML, Meta-SGD and iMAML.

    python examples/pytorch/maml.py [--figure FILE.png]

- MAML (Finn, Abbeel & Levine, ICML 2017): the inner loop is a plain loop of `bilevel_torch.TrainingStep` calls. Its
  result carries a graph to the model's own parameters, so `loss.backward()` and an optimizer of torch learn them.
- Meta-SGD (Li et al., arXiv 1707.09835): the same, and one inner learning rate for each weight is learned too.
- iMAML (Rajeswaran et al., NeurIPS 2019): the inner problem has a penalty for the distance to the initial weights. Any
  optimizer solves it, here L-BFGS. `implicit_minimizer` differentiates its minimum, not the path to it.

Tasks are sine waves with random amplitudes and phases, ten points each. The table has the loss on new waves before
adaptation and after each step. A step of iMAML is an iteration of L-BFGS. The last column is the loss after the whole
adaptation.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from tqdm import tqdm

import bilevel_torch

SHOTS, TASKS = 10, 4  # TASKS: of each step of the initial weights
INNER_RATE, OUTER_RATE, NEARNESS, SHOWN = 0.02, 1e-2, 0.5, 6
Points = tuple[torch.Tensor, torch.Tensor]
Weights = dict[str, torch.Tensor]


def network() -> nn.Module:
    """Return a network from the real line to the real line."""
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def wave(generator: torch.Generator) -> tuple[Points, Points]:
    """Return points to adapt to, and points of the same wave to test on."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(1, generator=generator), torch.pi * torch.rand(1, generator=generator)
    x = 10 * torch.rand(2, SHOTS, 1, generator=generator) - 5
    support, query = zip(x, amplitude * torch.sin(x - phase), strict=True)
    return support, query


class MAML:
    """Initial weights, and with ``learn_rates`` the rates of the inner steps."""

    steps = 3

    def __init__(self, seed: int, learn_rates: bool = False) -> None:
        torch.manual_seed(seed)
        self.net = network()
        self.log_rates = torch.full((len(list(self.net.parameters())),), INNER_RATE).log()
        self.log_rates.requires_grad_(learn_rates)
        inner = torch.optim.SGD([{"params": [w]} for w in self.net.parameters()], INNER_RATE)  # a group for each rate
        self.step = bilevel_torch.TrainingStep(
            self.net,
            inner,
            lambda net, rates, points: mse_loss(net(points[0]), points[1]),
            options=lambda rates, t, group: {"lr": rates[group["index"]]},
        )
        self.first = self.step.init()

    def parameters(self) -> list[torch.Tensor]:
        return [*self.net.parameters(), *([self.log_rates] if self.log_rates.requires_grad else [])]

    def adapt(self, support: Points, steps: int = steps) -> Weights:
        """Return weights after some steps, with a graph to the parameters."""
        state = self.first._replace(params=dict(self.net.named_parameters()))
        rates = self.log_rates.exp()
        for _ in range(steps):
            state = self.step(state, rates, support)
        return state.params


class ImplicitMAML:
    """Initial weights, near which the minimum for a wave lies."""

    steps = 15  # at most

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = network()
        solver = {"name": "cg", "maxiter": 10, "rtol": 1e-2}
        self.solve = bilevel_torch.implicit_minimizer(self.inner, solver=solver, on_failure="ignore")(self.train)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.net.parameters())

    def inner(self, weights: Weights, first: Weights, support: Points) -> torch.Tensor:
        x, y = support
        distance = sum(((weights[name] - first[name]) ** 2).sum() for name in weights)
        return mse_loss(functional_call(self.net, weights, (x,)), y) + NEARNESS / 2 * distance

    def train(self, first: Weights, support: Points, steps: int = steps) -> Weights:
        """Return weights near the minimum."""
        weights = {name: w.detach().clone().requires_grad_() for name, w in first.items()}
        first = {name: w.detach() for name, w in first.items()}
        optimizer = torch.optim.LBFGS(weights.values(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.inner(weights, first, support)
            loss.backward()
            return loss

        if steps:
            optimizer.step(closure)
        return weights

    def adapt(self, support: Points, steps: int = steps) -> Weights:
        return self.solve(dict(self.net.named_parameters()), support, steps=steps)


def learn(method: Any, iterations: int, seed: int, about: str) -> None:
    """Move the initial weights so that the adapted ones fit the other points of each wave."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(method.parameters(), OUTER_RATE)
    with tqdm(range(iterations), desc=about, unit="step") as bar:
        for _ in bar:
            optimizer.zero_grad()
            total = torch.zeros(())
            for _ in range(TASKS):
                support, (x, y) = wave(generator)
                total = total + mse_loss(functional_call(method.net, method.adapt(support), (x,)), y) / TASKS
            total.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{total.item():.3f}")


def losses(method: Any, numbers: list[int], waves: int = 50) -> list[float]:
    """Return the mean losses on new waves after some numbers of steps."""
    found = []
    for steps in numbers:
        generator, total = torch.Generator().manual_seed(10**6), 0.0  # the same waves for each number of steps
        for _ in range(waves):
            support, (x, y) = wave(generator)
            weights = {name: w.detach() for name, w in method.adapt(support, steps).items()}
            total += float(mse_loss(functional_call(method.net, weights, (x,)), y))
        found.append(total / waves)
    return found


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Learn by each method, and return the losses after 0, 1, ... inner steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=150, help="of the initial weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw a figure")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    methods = {
        "random weights": MAML(arguments.seed),
        "MAML": MAML(arguments.seed),
        "Meta-SGD": MAML(arguments.seed, learn_rates=True),
        "iMAML": ImplicitMAML(arguments.seed),
    }
    results = {}
    for name, method in methods.items():
        if name != "random weights":
            learn(method, arguments.iterations, arguments.seed, name)
        results[name] = losses(method, [*range(SHOWN), method.steps])
    print(f"{'loss after':<22}" + "".join(f"{k:>3} steps" for k in range(SHOWN)) + "  adapted")
    for name, values in results.items():
        print(f"{name:<22}" + "".join(f"{value:9.3f}" for value in values))
    print("rates of Meta-SGD:", ", ".join(f"{rate:.3f}" for rate in methods["Meta-SGD"].log_rates.exp().tolist()))
    if arguments.figure:
        picture(results, arguments.figure)
    return results


def picture(results: dict[str, list[float]], path: Path) -> None:
    """Draw the losses by the number of inner steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in results.items():
        axes.plot(values[:-1], "o-", label=name)
    axes.set(xlabel="steps of adaptation", ylabel="loss on new waves")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
