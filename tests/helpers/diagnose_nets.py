"""Modules for `bl.diagnose`: with right derivatives, with wrong ones, refused ones, and random ones."""

import torch

nn, F = torch.nn, torch.nn.functional


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x.reshape(len(x), 1, -1).expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.head(self.layer(x.reshape(-1, 4, 5)).reshape(-1, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


class Residual(nn.Module):
    """Weights, a buffer and a constant that no module call announces."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.gain = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.linspace(0, 1, 5))

    def forward(self, x):
        return self.head(x + self.gain * F.linear(x, self.body.weight + 0.1 * self.shift, self.body.bias).sin())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(nn.Tanh())
        self.net[0].weight.requires_grad_(False)

    def forward(self, x):
        return self.net(x)


def mlp(*between, width=8):
    return nn.Sequential(nn.Linear(5, width), *between, nn.Linear(width, 3))


def convolution():
    return nn.Sequential(
        Function(lambda x: F.pad(x, (0, 11)).reshape(-1, 1, 4, 4)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


GOOD = {
    "tanh": lambda: mlp(nn.Tanh()),
    "relu": lambda: mlp(nn.ReLU(), width=64),
    "gelu, layer norm": lambda: mlp(nn.LayerNorm(8), nn.GELU()),
    "group norm, silu": lambda: mlp(nn.GroupNorm(2, 8), nn.SiLU()),
    "convolution, max-pool": convolution,
    "batch norm, train": lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()),
    "batch norm, eval": lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()).eval(),
    "dropout, eval": lambda: mlp(nn.Dropout(0.5), nn.ReLU()).eval(),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "tied": Tied,
    "residual": Residual,
    "frozen weight": Frozen,
    "checkpoint": lambda: nn.Sequential(Checkpoint(), nn.Linear(3, 3)),
    "autocast": lambda: Autocast(),
    "spectral norm, eval": lambda: mlp_with_spectral_norm().eval(),
    "weight norm written out": lambda: mlp(WeightNorm(), nn.Tanh()),
}


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8, 1))

    def forward(self, x):
        return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True))


class Checkpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(nn.Tanh())

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(nn.Tanh())

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).to(x.dtype)


def once(x):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    return Tanh.apply(x)


def keeper(x):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.slope = 1 - x.tanh() ** 2
            return x.tanh()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.slope

    return Tanh.apply(x)


def half_detached(x):
    return x.tanh() * x.tanh().detach()


def data_of(x):
    return x.tanh() * torch.tensor(x.data.numpy()).tanh()


MUTANTS = {  # and the derivative that is to blame
    "intermediates on ctx": (lambda: mlp(Function(keeper)), "inner hvp"),
    "detach": (lambda: mlp(Function(half_detached)), "inner grad"),
    "spectral norm, train": (lambda: mlp_with_spectral_norm(), "inner hvp"),
    "data": (lambda: mlp(Function(data_of)), "inner grad"),
}


REFUSED = {  # by every call, and what the error names
    "weight norm": (lambda: mlp_with_weight_norm(), "weight_norm is wrong"),
    "once differentiable": (lambda: mlp(Function(once)), r"backward\(\) of Tanh has no derivative"),
}


def mlp_with_weight_norm():
    net = mlp(nn.Tanh())
    nn.utils.parametrizations.weight_norm(net[0])
    return net


RANDOM = {
    "dropout": lambda: mlp(nn.Dropout(0.5), nn.ReLU()),
    "noise": lambda: mlp(Function(lambda x: x + 0.1 * torch.randn_like(x)), nn.Tanh()),
}


def mlp_with_spectral_norm():
    net = mlp(nn.Tanh())
    nn.utils.parametrizations.spectral_norm(net[0])
    return net
