"""Time of metagradients in PyTorch against loops that are written by hand, and against TorchOpt and higher."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits

import bilevel as bl
import bilevel_torch

STEPS, RATE, MOMENTUM, TRAIN = 160, 0.05, 0.9, 600
Weights = list[torch.Tensor]


def digits() -> tuple[torch.Tensor, ...]:
    """Return training images and labels, and validation images and labels."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images / 16, dtype=torch.float32), torch.as_tensor(labels)
    return x[:TRAIN], y[:TRAIN], x[TRAIN : 2 * TRAIN], y[TRAIN : 2 * TRAIN]


def first_weights(seed: int = 0) -> Weights:
    """Return the weights of an MLP 64-32-10."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((64, 32), (32,), (32, 10), (10,))
    return [torch.randn(s, generator=g) / 8 if len(s) == 2 else torch.zeros(s) for s in shapes]


def logits(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of the MLP."""
    return torch.tanh(x @ w[0] + w[1]) @ w[2] + w[3]


def weighted(w: Weights, weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean of the losses times the weights of the examples."""
    return (weights * torch.nn.functional.cross_entropy(logits(w, x), y, reduction="none")).mean()


class Digits:
    """Runs of momentum on the digits, with a weight for each example as λ."""

    def __init__(self) -> None:
        self.x, self.y, self.xv, self.yv = digits()
        self.w = first_weights()
        self.weights = torch.ones(TRAIN)

    def validation(self, w: Weights) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits(w, self.xv), self.yv)

    def train(self) -> Weights:
        """Train without a derivative."""
        w, m = [a.clone().requires_grad_() for a in self.w], [torch.zeros_like(a) for a in self.w]
        for _ in range(STEPS):
            g = torch.autograd.grad(weighted(w, self.weights, self.x, self.y), w)
            with torch.no_grad():
                m = [MOMENTUM * a + b for a, b in zip(m, g, strict=True)]
                w = [(a - RATE * b).requires_grad_() for a, b in zip(w, m, strict=True)]
        return w

    def by_hand(self) -> torch.Tensor:
        """Differentiate the loop."""
        weights = self.weights.clone().requires_grad_()
        w, m = [a.clone().requires_grad_() for a in self.w], [torch.zeros_like(a) for a in self.w]
        for _ in range(STEPS):
            g = torch.autograd.grad(weighted(w, weights, self.x, self.y), w, create_graph=True)
            m = [MOMENTUM * a + b for a, b in zip(m, g, strict=True)]
            w = [a - RATE * b for a, b in zip(w, m, strict=True)]
        return torch.autograd.grad(self.validation(w), weights)[0]

    def step(self, state: Any, weights: torch.Tensor, batch: Any) -> Any:
        w, m = state
        create = bilevel_torch.recording()
        g = torch.autograd.grad(weighted(w, weights, *batch), w, create_graph=create)
        m = [MOMENTUM * a + b for a, b in zip(m, g, strict=True)]
        return [a - RATE * b for a, b in zip(w, m, strict=True)], m

    def ours(self, outer: Callable[..., torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
        training = bl.Training(self.step, outer or (lambda state, weights: self.validation(state[0])))
        first = self.w, [torch.zeros_like(a) for a in self.w]
        batches = [(self.x, self.y)]
        return bl.metagradient(training, first, self.weights, batches, steps=STEPS, **options).grad

    def each(self, state: Any, weights: torch.Tensor) -> torch.Tensor:
        """Return the losses of 20 queries."""
        return torch.nn.functional.cross_entropy(logits(state[0], self.xv[:20]), self.yv[:20], reduction="none")

    def module(self) -> torch.Tensor:
        """Take the user's module and torch.optim.SGD."""
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
        with torch.no_grad():
            for param, start in zip(model.parameters(), self.w, strict=True):
                param.copy_(start.T if start.ndim == 2 else start)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)

        def loss(model: Any, weights: torch.Tensor, batch: Any) -> torch.Tensor:
            x, y = batch
            return (weights * torch.nn.functional.cross_entropy(model(x), y, reduction="none")).mean()

        step = bilevel_torch.TrainingStep(model, optimizer, loss)

        def outer(state: Any, weights: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(step.evaluate(state, lambda m: m(self.xv)), self.yv)

        training, batches = bl.Training(step, outer), [(self.x, self.y)]
        return bl.metagradient(training, step.init(), self.weights, batches, steps=STEPS, checkpoints="none").grad

    def torchopt(self) -> torch.Tensor:
        """Take TorchOpt's differentiable SGD."""
        import torchopt

        net = _Net(self.w)
        weights = self.weights.clone().requires_grad_()
        optimizer = torchopt.MetaSGD(net, lr=RATE, momentum=MOMENTUM)
        for _ in range(STEPS):
            optimizer.step(weighted(net.values(), weights, self.x, self.y))
        return torch.autograd.grad(self.validation(net.values()), weights)[0]

    def higher(self) -> torch.Tensor:
        """Take the differentiable SGD of higher."""
        import higher

        net = _Net(self.w)
        weights = self.weights.clone().requires_grad_()
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
        with higher.innerloop_ctx(net, optimizer) as (fast, differentiable):
            for _ in range(STEPS):
                differentiable.step(weighted(fast.values(), weights, self.x, self.y))
            return torch.autograd.grad(self.validation(fast.values()), weights)[0]


class _Net(torch.nn.Module):
    def __init__(self, w: Weights) -> None:
        super().__init__()
        self.w = torch.nn.ParameterList([a.clone() for a in w])

    def values(self) -> Weights:
        return [self.w[0], self.w[1], self.w[2], self.w[3]]

    forward = values


def maml(tasks: int = 8, shots: int = 10) -> dict[str, Callable[[], Any]]:
    """Return MAML by hand, by `bl.metagradient` and by a loop of `bilevel_torch.TrainingStep`.

    There are 3 steps on sine waves. The derivative is by the initial weights of an MLP 1-40-40-1 and the learning rate.
    """
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 40), (40,), (40, 40), (40,), (40, 1), (1,))
    start = [torch.randn(s, generator=g) / max(s[0], 1) ** 0.5 if len(s) == 2 else torch.zeros(s) for s in shapes]
    x = torch.randn(tasks, 2 * shots, 1, generator=g)
    y = torch.sin(x + torch.randn(tasks, 1, 1, generator=g))

    def loss(w: Weights, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.relu(torch.relu(x @ w[0] + w[1]) @ w[2] + w[3])
        return ((h @ w[4] + w[5] - y) ** 2).mean()

    def step(w: Weights, rate: torch.Tensor, batch: Any) -> Weights:
        g = torch.autograd.grad(loss(w, *batch), w, create_graph=bilevel_torch.recording())
        return [a - rate * b for a, b in zip(w, g, strict=True)]

    def by_hand() -> list[torch.Tensor]:
        first, rate = [a.clone().requires_grad_() for a in start], torch.tensor(0.01, requires_grad=True)
        total: Any = 0
        for i in range(tasks):
            w = first
            for _ in range(3):
                g = torch.autograd.grad(loss(w, x[i, :shots], y[i, :shots]), w, create_graph=True)
                w = [a - rate * b for a, b in zip(w, g, strict=True)]
            total = total + loss(w, x[i, shots:], y[i, shots:])
        return list(torch.autograd.grad(total, [*first, rate]))

    def ours() -> list[torch.Tensor]:
        rate, total = torch.tensor(0.01), [torch.zeros(())] * 7
        training = bl.Training(step, lambda w, rate, x, y: loss(w, x, y))
        for i in range(tasks):
            query, support = (x[i, shots:], y[i, shots:]), [(x[i, :shots], y[i, :shots])]
            found = bl.metagradient(training, start, rate, support, steps=3, outer_args=query, checkpoints="none")
            total = [a + b for a, b in zip(total, [*found.state_grad, found.grad], strict=True)]
        return total

    net = torch.nn.Sequential(
        *(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
    )
    with torch.no_grad():
        for parameter, a in zip(net.parameters(), start, strict=True):
            parameter.copy_(a.T if a.dim() == 2 else a)
    first = dict(net.named_parameters())

    def of_net(net: Any, rate: Any, batch: Any) -> torch.Tensor:
        return ((net(batch[0]) - batch[1]) ** 2).mean()

    def module_by_hand() -> list[torch.Tensor]:
        rate, total = torch.tensor(0.01, requires_grad=True), torch.zeros(())
        for i in range(tasks):
            params = first
            for _ in range(3):
                out = torch.func.functional_call(net, params, (x[i, :shots],))
                inner = ((out - y[i, :shots]) ** 2).mean()
                g = torch.autograd.grad(inner, list(params.values()), create_graph=True)
                params = {name: a - rate * b for (name, a), b in zip(params.items(), g, strict=True)}
            out = torch.func.functional_call(net, params, (x[i, shots:],))
            total = total + ((out - y[i, shots:]) ** 2).mean()
        return list(torch.autograd.grad(total, [*first.values(), rate]))

    rates = lambda rate, t, group: {"lr": rate}  # noqa: E731
    training_step = bilevel_torch.TrainingStep(net, torch.optim.SGD(net.parameters(), 0.01), of_net, options=rates)

    untrained = training_step.init()

    def module() -> list[torch.Tensor]:
        rate, total = torch.tensor(0.01, requires_grad=True), torch.zeros(())
        for i in range(tasks):
            state = untrained._replace(params=first)
            for _ in range(3):
                state = training_step(state, rate, (x[i, :shots], y[i, :shots]))
            out = torch.func.functional_call(net, state.params, (x[i, shots:],))
            total = total + ((out - y[i, shots:]) ** 2).mean()
        return list(torch.autograd.grad(total, [*first.values(), rate]))

    return {
        "by hand": by_hand,
        "bl.metagradient": ours,
        "a module by hand": module_by_hand,
        "bilevel_torch.TrainingStep": module,
    }
