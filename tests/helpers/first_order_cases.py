"""A trained network for tests of `bilevel_torch.FirstOrder`."""

from functools import partial
from typing import Any

import torch
from torch import nn

SGD = partial(torch.optim.SGD, lr=0.5)


def regression(dtype: torch.dtype = torch.float64, activation: Any = nn.Tanh) -> tuple[Any, Any, Any, Any]:
    """Return a trained network, a weight for each example, and the two losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 1)).to(dtype)
    x, x_val = torch.randn(2, 12, 3, dtype=torch.float64).to(dtype)
    weights = torch.zeros(12, dtype=dtype, requires_grad=True)

    def inner():
        decay = 0.2 * sum((p**2).sum() for p in net.parameters())
        return (weights.exp() * ((net(x) - x[:, :1].sin()) ** 2)[:, 0]).mean() + decay

    def outer():
        return ((net(x_val) - x_val[:, :1].sin()) ** 2).mean()

    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = inner()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights.grad = None
    return net, weights, inner, outer
