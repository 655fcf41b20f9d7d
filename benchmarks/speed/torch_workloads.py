"""Inner and outer losses in PyTorch, each with a decay per weight as its hyperparameters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from benchmarks.speed.sizes import CLASSES, DECAYS, Size


@dataclass
class Workload:
    """A network with its data; its losses as a loop computes them, and as functions of weights and decays."""

    net: nn.Module
    log_decays: list[torch.Tensor]
    train: tuple[torch.Tensor, torch.Tensor]
    val: tuple[torch.Tensor, torch.Tensor]
    step_size: float

    def __post_init__(self) -> None:
        self.names = [name for name, _ in self.net.named_parameters()]

    @property
    def params(self) -> list[torch.Tensor]:
        """What the inner optimizer trains."""
        return list(self.net.parameters())

    def inner_loss(self) -> torch.Tensor:
        """Return L with its graph."""
        return self.loss(self.net, *self.train) + penalty(self.params, self.log_decays)

    def outer_loss(self) -> torch.Tensor:
        """Return F with its graph."""
        return self.loss(self.net, *self.val)

    def loss(self, net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of a network."""
        return cross_entropy(net(x), y)

    def inner(self, w: dict[str, torch.Tensor], h: list[torch.Tensor], x: Any, y: Any) -> torch.Tensor:
        """Return L as a function."""
        return self.outer(w, h, x, y) + penalty([w[name] for name in self.names], h)

    def outer(self, w: dict[str, torch.Tensor], h: list[torch.Tensor], x: Any, y: Any) -> torch.Tensor:
        """Return F as a function."""
        del h
        return cross_entropy(torch.func.functional_call(self.net, w, (x,)), y)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.train[0].is_cuda:
            torch.cuda.synchronize()


def penalty(params: Any, log_decays: Any) -> torch.Tensor:
    """Return ½ Σ exp(λ) w²."""
    return sum(0.5 * (h.exp() * w.square()).sum() for w, h in zip(params, log_decays, strict=True))


class Residual(nn.Module):
    """Two convolutions around which the input is carried."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False), nn.GroupNorm(4, outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.GroupNorm(4, outside),
        )  # fmt: skip
        self.carry = nn.Identity() if stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return (self.body(x) + self.carry(x)).relu()


class LastOf(nn.Module):
    """An LSTM that reads a sequence, and a linear layer on its last output."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, hidden, batch_first=True), nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of sequences of shape (n, time, features)."""
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """Pre-norm encoder blocks, and a linear layer on the mean; attention has a second derivative by the math kernel."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of sequences of shape (n, time, width)."""
        with sdpa_kernel(SDPBackend.MATH):
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean(1))


def network(name: str, size: Size) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network and the shape of an input."""
    width, features = size.width, size.features
    if name == "logistic":
        return nn.Linear(features, CLASSES), (features,)
    if name == "mlp":
        hidden = [nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(width, CLASSES)), (features,)
    if name == "convnet":
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU(),
            Residual(width, width, 1), Residual(width, 2 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        ), (3, features, features)  # fmt: skip
    if name == "lstm":
        return LastOf(features, width), (size.length, features)
    if name == "transformer":
        return Transformer(width, size.depth), (size.length, width)
    raise ValueError(f"no workload {name!r}")


def workload(name: str, size: Size, device: str = "cpu") -> Workload:
    """Make a workload with random data; decays spread over three decades, so that CG has something to do."""
    torch.manual_seed(0)
    net, shape = network(name, size)

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size.batch, *shape), torch.randint(CLASSES, (size.batch,))

    low, high = (float(torch.tensor(d).log()) for d in DECAYS)
    decays = [torch.empty_like(p).uniform_(low, high).requires_grad_() for p in net.parameters()]
    train, val = data(), data()
    net.to(device)
    if name == "convnet":  # or else negative curvature outweighs the decays
        net[-1].weight.data.mul_(0.1)
    decays, train, val = tree_map(lambda t: t.detach().to(device), (decays, train, val))
    return Workload(net, [d.requires_grad_() for d in decays], train, val, size.step_size)
