"""Count the memory and the traffic of hypergradients with sharded parameters (FSDP2), with gloo on CPU processes.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --ranks 1 2 --width 400 --layers 4

A perceptron with layers of equal width, in float32, sharded by `fully_shard` layer by layer. Each rank is a process.
Printed are, for the first rank:

- vectors: the peak memory of tensors as large as the rank's part of a layer, during a call with 10 products of CG, in
  copies of all parameters. One process without shards (``plain``) is the reference: the target is 1/R of it;
- gathered: the peak memory of whole layers, in layers;
- sent: the bytes that a rank sends for one product, in copies of all parameters, divided by (R − 1)/R. An all-gather
  and a reduce-scatter of n bytes send n (R − 1)/R bytes, an all-reduce sends twice as much;
- time: a product, divided by a forward and backward pass of FSDP2 with the same batch. Both are interleaved. The
  table has the medians of the ratios of wall times and of CPU times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import bilevel as bl
import bilevel_torch

BATCH, PRODUCTS, REPEATS = 32, 10, 9


class Counter(TorchDispatchMode):
    """Count the bytes that a rank sends, and the peak memory of tensors of some sizes.

    Args:
        sizes: sizes in bytes, by name.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.names = {size: name for name, size in sizes.items()}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = dict.fromkeys(sizes, 0)
        self.peaks = dict.fromkeys(sizes, 0)
        self.sent = 0.0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # count the operations of its parts
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if "all_gather_into_tensor" in name:
            self.sent += result.nbytes
        elif "reduce_scatter_tensor" in name:
            self.sent += args[0].nbytes
        elif "all_reduce" in name or "allreduce" in name:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self.sent += 2 * first.nbytes
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self._watch(t.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        if (name := self.names.get(storage.nbytes())) is None or storage._cdata in self.live:
            return
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        now = sum(size for _, size in self.live.values() if self.names[size] == name)
        self.peaks[name] = max(self.peaks[name], now)


def perceptron(width: int, layers: int) -> nn.Sequential:
    """Return a perceptron whose layers have equal sizes, without biases."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.Tanh())])


def measure(rank: int, world: int, width: int, layers: int, plain: bool) -> dict[str, float]:
    """Return the counts of one rank."""
    net = perceptron(width, layers)
    if not plain:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in net:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(net, mesh=mesh)
    backend = bilevel_torch.TorchBackend() if plain else bilevel_torch.Sharded(net)
    torch.manual_seed(1 + rank)
    x, y, x_val, y_val = torch.randn(4, BATCH, width)
    decay = torch.tensor(-5.0, requires_grad=True)

    def inner() -> torch.Tensor:
        total: Any = sum((p**2).sum() for p in net.parameters())
        return (net(x) - y).square().mean() + decay.exp() * (total if plain else total.full_tensor())

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        return inner(), (net(x_val) - y_val).square().mean()

    if plain:
        both = losses()
    else:
        with backend.losses():  # pyright: ignore
            both = losses()
    layer = width * width * 4
    sizes = {"vectors": layer // world} | ({"gathered": layer} if world > 1 else {})
    params = list(net.parameters())
    solver = bl.CG(maxiter=PRODUCTS, rtol=None, damping=1.0)
    with Counter(sizes) as counter:
        bilevel_torch.hypergradient(*both, params, decay, solver=solver, backend=backend)
    found = {"vectors": counter.peaks["vectors"] / (layer // world * layers) / world}
    found["gathered"] = counter.peaks.get("gathered", 0) / layer
    if plain:
        return found
    with torch.no_grad():
        at = backend.inner_of(both[0], params, decay)
        v = [torch.ones_like(p) for p in params]
        with Counter(sizes) as counter:
            at.vjp_params(v)
    found["sent"] = counter.sent / (layer * layers)

    def product() -> None:
        with torch.no_grad():
            at.vjp_params(v)

    def step() -> None:
        net.zero_grad()
        (net(x) - y).square().mean().backward()

    walls, cpus = zip(*[_ratios(product, step) for _ in range(REPEATS)], strict=True)
    return found | {"wall": median(walls), "cpu": median(cpus)}


def _ratios(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Return the ratios of the wall times and the CPU times of two functions."""
    times = []
    for function in (first, second):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[0][0] / times[1][0], times[0][1] / times[1][1]


def run(world: int, arguments: argparse.Namespace, plain: bool = False) -> dict[str, float]:
    """Start the ranks, and return the counts of the first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
        command = [sys.executable, "-m", "benchmarks.sharded", *sizes, *["--plain"] * plain, "--folder", folder]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank), "--world", str(world)], env=environment)
            for rank in range(world)
        ]
        if any(process.wait() for process in processes):
            raise RuntimeError("a rank has failed")
        return json.loads((Path(folder) / "found.json").read_text())


def main() -> None:
    """Print a table, or measure as one rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--layers", type=int, default=8)
    for option in ("--rank", "--world", "--folder"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        rank, world, folder = int(arguments.rank), int(arguments.world), Path(arguments.folder)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = measure(rank, world, arguments.width, arguments.layers, arguments.plain)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)  # FSDP keeps the group, whose threads may abort the process while the interpreter ends
    reference = run(1, arguments, plain=True)["vectors"]
    print(f"{arguments.layers} layers, {arguments.layers * arguments.width**2:,} weights. One process: {reference:.2f}")
    print("| ranks | vectors | relative to one process | gathered layers | sent | wall time | CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world in arguments.ranks:
        r = run(world, arguments)
        ratio = r["vectors"] / reference
        print(
            f"| {world} | {r['vectors']:.2f} | {ratio:.3f} | {r['gathered']:.1f} | {r['sent']:.2f} | {r['wall']:.2f} | "
            f"{r['cpu']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
