"""Models with their data, to be sharded, and ways to shard them."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

F = nn.functional
SAMPLES, CLASSES = 12, 3


class Tied(nn.Module):
    """A transformer with one head. Its embedding is also its output layer."""

    def __init__(self, words=7, width=4):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.attention = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in "qkv"})
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        q, k, v = (self.attention[name](x) for name in "qkv")
        x = x + (q @ k.mT).softmax(-1) @ v
        return self.head(self.norm(x)).mean(1)[:, :CLASSES]


class Convolutions(nn.Module):
    """A convolution, BatchNorm in eval mode and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).tanh().mean(-1))


class Checkpointed(nn.Sequential):
    """A perceptron whose first layers run again in each backward pass."""

    def forward(self, x):
        return self[2](checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False))


def make(name):
    """Return a model in float64 and a function that draws its inputs."""
    torch.manual_seed(0)
    if name == "tied":
        return Tied().double(), lambda g: torch.randint(7, (SAMPLES, 5), generator=g)
    if name == "convnet":
        net = Convolutions().double()
        net(torch.randn(9, 2, 7, dtype=torch.float64) * 2)  # running statistics
        return net.eval(), lambda g: torch.randn(SAMPLES, 2, 7, generator=g, dtype=torch.float64)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)]
    if name == "deep":
        layers = [
            nn.Linear(4, 6),
            nn.Tanh(),
            nn.Linear(6, 5),
            nn.Tanh(),
            nn.Linear(5, 6),
            nn.Tanh(),
            nn.Linear(6, CLASSES),
        ]
    net = Checkpointed(*layers) if name == "checkpointed" else nn.Sequential(*layers)
    return net.double(), lambda g: torch.randn(SAMPLES, 4, generator=g, dtype=torch.float64)


def data(draw):
    """Return the inputs and labels for training and validation."""
    generator = torch.Generator().manual_seed(1)
    x, x_val = draw(generator), draw(generator)
    y, y_val = torch.randint(CLASSES, (2, SAMPLES), generator=generator)
    return x, y, x_val, y_val


def fsdp(net, mesh, **options):
    """Shard a copy of a model by fully_shard, layer by layer. Tied parameters belong to the root."""
    net = copy.deepcopy(net)
    for name, part in net.named_children():
        if list(part.parameters()) and name not in ("embedding", "head"):
            fully_shard(part, mesh=mesh, **options) if not isinstance(part, nn.ModuleDict) else None
    return fully_shard(net, mesh=mesh, **options)


def tensor_parallel(net, mesh):
    """Split the linear layers of a copy of a deep perceptron: by columns and by rows, in turn."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    return parallelize_module(copy.deepcopy(net), mesh, plan)


def share(rank, world):
    """Return the rows of a rank. The ranks have different numbers of rows."""
    ends = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 6, 7, 12]}[world]
    return slice(ends[rank], ends[rank + 1])


def whole(t):
    """Return a tensor without shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
