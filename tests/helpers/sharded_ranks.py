"""The program of each process in test_sharded.py: `python sharded_ranks.py RANK WORLD FOLDER`."""

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_models import CLASSES, SAMPLES, F, data, fsdp, make, share, tensor_parallel, whole

import bilevel as bl
import bilevel_torch

SOLVERS = {
    "cg": bl.CG(damping=1.0, rtol=1e-12),
    "minres": bl.MINRES(damping=1.0, rtol=1e-12),
    "gmres": bl.GMRES(damping=1.0, rtol=1e-12, restart=40),
    "neumann": bl.Neumann(terms=40, damping=1.0),
    "nystrom": bl.Nystrom(rank=4, damping=1.0),
    "identity": bl.Identity(),
    "preconditioned": bl.CG(damping=1.0, rtol=1e-12, preconditioner=bl.NystromPreconditioner(rank=4)),
}


class Run:
    """A model with hyperparameters and data, whole or sharded.

    Args:
        net: the model.
        rows: the rows of the data that this process has.
        decays: a log-decay for each parameter tensor, and whether its entries belong to the weights.
    """

    def __init__(self, name, shard=None, rows=slice(None), per_weight=False):
        net, draw = make(name)
        self.net = shard(net) if shard else net
        self.x, self.y, self.x_val, self.y_val = data(draw)
        self.rows = rows
        self.samples = len(range(SAMPLES)[rows])
        self.weights = torch.zeros(SAMPLES, dtype=torch.float64, requires_grad=True)
        self.decays = [torch.full_like(p, -2.0) if per_weight else p.new_tensor(-2.0) for p in self.net.parameters()]
        if not per_weight:
            self.decays = [torch.tensor(-2.0, dtype=torch.float64) for _ in self.decays]
        for decay in self.decays:
            decay.requires_grad_()

    def losses(self):
        """Return both losses of the rows."""
        penalty = sum((d.exp() * self.square(p)).sum() for d, p in zip(self.decays, self.net.parameters(), strict=True))
        return self.fit() + whole(penalty), self.loss(self.x_val, self.y_val).mean()
