"""Models with their data, to be sharded, and ways to shard them."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

F = nn.functional
SAMPLES = 12
CLASSES = 3


class Tied(nn.Module):
    """A transformer whose embedding is also its output layer."""

    def __init__(self, words=11, width=8):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.block = Block(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.block(self.embedding(x)))).mean(1)


class Block(nn.Module):
    """Attention with one head, written out, and a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        scores = (self.q(x) @ self.k(x).mT) / x.shape[-1] ** 0.5
        return x + self.out(scores.softmax(-1) @ self.v(x))


class Convolutions(nn.Module):
    """A convolution, BatchNorm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).tanh().mean(-1))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def make(name):
    """Return a model in float64 and a function that draws inputs."""
    torch.manual_seed(0)
    if name == "mlp":
        return mlp().double(), lambda g: torch.randn(SAMPLES, 4, generator=g, dtype=torch.float64)
    if name == "convnet":
        net = Convolutions().double()
        net(torch.randn(9, 2, 7, dtype=torch.float64) * 2)  # running statistics
        return net.eval(), lambda g: torch.randn(SAMPLES, 2, 7, generator=g, dtype=torch.float64)
    return Tied().double(), lambda g: torch.randint(11, (SAMPLES, 6), generator=g)


def data(draw):
    """Return the inputs and labels for training and validation."""
    generator = torch.Generator().manual_seed(1)
    x, x_val = draw(generator), draw(generator)
    y, y_val = torch.randint(CLASSES, (2, SAMPLES), generator=generator)
    return x, y, x_val, y_val


def fsdp(net, mesh):
    """Shard a copy of a model by fully_shard, layer by layer."""
    net = copy.deepcopy(net)
    if isinstance(net, Tied):
        fully_shard(net.block, mesh=mesh)
    else:
        for part in net.children():
            if list(part.parameters()):
                fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(net, mesh):
    """Split two layers of a copy of a perceptron: the first by columns, the next by rows."""
    net = copy.deepcopy(net)
    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def share(rank, world, even=False):
    """Return the rows of a rank."""
    if even or world == 1:
        return slice(rank, None, world)
    ends = {2: [0, 5, 12], 4: [0, 2, 6, 7, 12]}[world]
    return slice(ends[rank], ends[rank + 1])


def whole(t):
    """Return a tensor without shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


