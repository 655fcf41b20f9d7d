"""The program of each process in test_first_order_ranks.py: `python first_order_ranks.py RANK WORLD STORE`."""

import copy
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bilevel_torch

TRACK = partial(torch.optim.SGD, lr=0.1)


def hypergradient(net, x, x_val, rows, optimizer):
    """Return the third hypergradient by a weight for each example, from some of the rows."""
    weights = torch.zeros(len(x), requires_grad=True)
    first_order = bilevel_torch.FirstOrder(net, weights, optimizer=optimizer)

    def inner():
        return (weights.exp()[rows] * (net(x[rows]) - 1)[:, 0] ** 2).mean()

    results = [first_order.backward(inner, lambda: net(x_val[rows]).square().mean()) for _ in range(3)]
    inner().backward()  # a training step is still possible
    return results[-1].grad


def main(rank, world, store):
    """Print the relative error against one process, for each wrapper and both ways to choose v."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x, x_val = torch.randn(2, 8, 3)
    for optimizer in (None, TRACK):
        expected = hypergradient(copy.deepcopy(net), x, x_val, slice(None), optimizer)
        sharded = copy.deepcopy(net)
        fully_shard(sharded[0])
        fully_shard(sharded)
        for wrapped in (DistributedDataParallel(copy.deepcopy(net)), sharded):
            grad = hypergradient(wrapped, x, x_val, slice(rank, None, world), optimizer)
            dist.all_reduce(grad)  # each rank has the part of its examples
            if rank == 0:
                print(float((grad / world - expected).norm() / expected.norm()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
