"""FSDP2 as Lightning Fabric and Accelerate set it up: `torchrun --nproc-per-node 2 launched_ranks.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from sharded_models import F, data, make
from torch.distributed.fsdp import fully_shard

import bilevel as bl
import bilevel_torch

SOLVER = bl.CG(damping=4.0, rtol=1e-7)


def by_fabric():
    """Return a model, an optimizer and a backward function."""

    def parallelize(net, mesh):
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh["data_parallel"])
        return net

    strategy = ModelParallelStrategy(parallelize, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    net = fabric.setup_module(make("mlp")[0].float())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), 0.1))
    return net, optimizer, fabric.backward


def by_accelerate():
    """Return a model, an optimizer and a backward function."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=8, reshard_after_forward=True
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate ignores the plugin on a CPU.
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    net = make("mlp")[0].float()
    return *accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1)), accelerator.backward


def hypergradient(net, x, y, x_val, y_val, h, whole):
    """Return the hypergradient of some data."""

    def losses():
        penalty = sum((p**2).sum() for p in net.parameters())
        inner = F.cross_entropy(net(x), y) + h.exp() * (penalty if whole else penalty.full_tensor())
        return inner, F.cross_entropy(net(x_val), y_val)

    if whole:
        backend, both = bilevel_torch.TorchBackend(), losses()
    else:
        backend = bilevel_torch.Sharded(net)
        with backend.losses():
            both = losses()
    return bilevel_torch.hypergradient(*both, net.parameters(), h, solver=SOLVER, backend=backend).grad


def error(setup):
    """Return the relative error of a hypergradient after a step of training. Check that training goes on."""
    net, optimizer, backward = setup()
    one, draw = make("mlp")
    one, (x, y, x_val, y_val) = one.float(), data(draw)
    x, x_val, h = x.float(), x_val.float(), torch.tensor(-2.0, requires_grad=True)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    single = torch.optim.SGD(one.parameters(), 0.1)

    def train():
        optimizer.zero_grad()
        backward(F.cross_entropy(net(x[mine]), y[mine]))
        optimizer.step()

    train()
    F.cross_entropy(one(x), y).backward()
    single.step()
    found = hypergradient(net, x[mine], y[mine], x_val[mine], y_val[mine], h, whole=False)
    train()
    expected = hypergradient(one, x, y, x_val, y_val, h, whole=True)
    return float((found - expected).abs() / expected.abs())


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {setup.__name__: error(setup) for setup in (by_fabric, by_accelerate)}
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # FSDP has kept the group, whose threads may abort the process while the interpreter ends
