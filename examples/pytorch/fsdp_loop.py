"""A decay for each weight of a network that is sharded over several processes: FSDP2 (fully_shard).

    torchrun --nproc-per-node 2 examples/pytorch/fsdp_loop.py --config examples/solver.toml

Weights, decays, their gradients and all vectors of the solver stay sharded. On one process, it prints the same losses.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import bilevel as bl
import bilevel_torch
from bilevel.demo.data import load

INNER_STEPS = 10  # of training, for each step of the hyperparameters
SOLVER = {"name": "cg", "damping": 0.1, "maxiter": 20, "rtol": 1e-2}


def main(argv: list[str] | None = None) -> None:
    """Tune the decays. The first rank prints the losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", default=SOLVER, help="a file with a table [solver]")
    parser.add_argument("--steps", type=int, default=40, help="of the hyperparameters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    dist.init_process_group("gloo")
    try:
        run(arguments, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def run(arguments: argparse.Namespace, rank: int, world: int) -> None:
    """Tune on this rank's share of the data."""
    torch.manual_seed(arguments.seed)
    parts = load(arguments.seed)
    (x, y), (x_val, y_val) = (
        (torch.as_tensor(part.X[rank::world], dtype=torch.float32), torch.as_tensor(part.y[rank::world]))
        for part in (parts.train, parts.validation)
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    for part in (net[0], net[2], net):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    decays = [torch.full_like(w, -9.0, requires_grad=True) for w in net.parameters()]  # sharded as the weights are
    outer_optimizer = torch.optim.Adam(decays, lr=0.2)
    solver = bl.WarmStart(arguments.config)
    # How much data each loss is the mean of: shares may differ.
    backend = bilevel_torch.Sharded(net, inner_samples=len(y), outer_samples=len(y_val))

    def inner_loss() -> torch.Tensor:
        penalty = sum((d.exp() * w**2).sum() for d, w in zip(decays, net.parameters(), strict=True))
        return cross_entropy(net(x), y) + penalty.full_tensor()

    with tqdm(range(arguments.steps), unit="step", disable=rank > 0) as bar:
        for step in bar:
            for _ in range(INNER_STEPS):
                optimizer.zero_grad()
                inner_loss().backward()
                optimizer.step()
            outer_optimizer.zero_grad()
            with backend.losses():
                inner, outer = inner_loss(), cross_entropy(net(x_val), y_val)
            hg = bilevel_torch.backward(inner, outer, net.parameters(), decays, solver=solver, backend=backend)
            outer_optimizer.step()
            bar.set_postfix(val=f"{hg.value:.3f}")  # of all ranks
            if step in (0, arguments.steps - 1) and rank == 0:
                bar.write(f"step {step + 1}: validation loss {hg.value:.4f}")
    test_x, test_y = torch.as_tensor(parts.test.X, dtype=torch.float32), torch.as_tensor(parts.test.y)
    accuracy = (net(test_x).argmax(1) == test_y).float().mean()
    if rank == 0:
        print(f"{world} ranks, {sum(d.numel() for d in decays):,} decays: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
