"""A small PyTorch loop: a net, a decay and two losses, for tests of what a loop can do wrong."""

import torch
from torch import nn

import bilevel as bl
import bilevel_torch

X = torch.ones(5, 3)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def new_decay():
    return torch.tensor(-1.0, requires_grad=True)


def losses(net, decay, of=None):
    """Return an inner and an outer loss. The penalty is of the weights of another module if ``of`` is given."""
    penalty = decay.exp() * sum((p**2).sum() for p in (of or net).parameters())
    return (net(X) - 1).pow(2).mean() + penalty, net(X).pow(2).mean()


def call(inner, outer, params, hparams, **options):
    options.setdefault("solver", bl.CG(damping=10.0, rtol=1e-4))
    return bilevel_torch.backward(inner, outer, params, hparams, **options)


class Bent(nn.Module):
    """A module that torch.compile compiles as a whole, with an activation to choose."""

    def __init__(self, bend=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.bend = nn.Linear(3, 4), nn.Linear(4, 1), bend

    def forward(self, x):
        return self.second(self.bend(self.first(x)))


class Twice(torch.autograd.Function):
    """A wrong derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def flat(tensors):
    """Return the entries of tensors as one NumPy array."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()
