"""FSDP2 in two workers of Ray Train: `python ray_workers.py FOLDER`. Each worker writes its error to a file."""

import os
import sys
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0")

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config):
    """Compare a hypergradient with one process."""
    import torch
    import torch.distributed as dist
    from sharded_models import fsdp, share
    from sharded_ranks import Run, error

    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    found = Run("mlp", lambda net: fsdp(net, mesh), share(rank, world)).vectors()
    (Path(config["folder"]) / f"{rank}.txt").write_text(str(error(found, Run("mlp").vectors())))


if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=f"{folder}/ray"),
    ).fit()
