"""Count the memory and the traffic of hypergradients with sharded parameters (FSDP2), with gloo on CPU processes.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --ranks 1 2 --width 400 --layers 4

A perceptron with layers of equal width, in float32, sharded by `fully_shard` layer by layer. Each rank is a process.
Printed are, for the first rank:

- vectors: the peak memory of tensors as large as the rank's part of a layer, during a call with 10 products of CG, in
  copies of all parameters. One process without shards (``plain``) is the reference: the target is 1/R of it;
- gathered: the peak memory of the results of all-gathers of whole layers, in layers;
- whole: the same with all other tensors as large as a whole layer, such as gradients before they are reduced;
- sent: the bytes that a rank sends for one product, in copies of all parameters, divided by (R − 1)/R. An all-gather
  and a reduce-scatter of n bytes send n (R − 1)/R bytes, an all-reduce sends twice as much;
- collectives: their number in one product;
- time: a product, divided by a forward and backward pass of FSDP2 with the same batch, and by a product that is written
  by hand with DTensors. The latter gathers all parameters once, and holds them and whole vectors. All are interleaved.
  The table has the medians of the ratios of wall times and of CPU times.

With ``--stay``, the parameters have ``reshard_after_forward=False``, and stay gathered.
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
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import bilevel as bl
import bilevel_torch

BATCH, PRODUCTS, REPEATS = 32, 10, 9


class Counter(TorchDispatchMode):
    """Count the bytes that a rank sends, the collectives, and the peak memory of tensors of some sizes.

    Args:
        sizes: sizes in bytes, by name.

    Attributes:
        peaks: peaks in bytes, by name. Those of "gathered" are of the results of all-gathers, of any of the sizes.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.names = {size: name for name, size in sizes.items()}
        self.live: dict[int, tuple[StorageWeakRef, int, set[str]]] = {}
        self.peaks = dict.fromkeys([*sizes, "gathered"], 0)
        self.sent, self.collectives = 0.0, 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # count the operations of its parts
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if gathers := "all_gather_into_tensor" in name:
            self._count(result.nbytes)
        elif "reduce_scatter_tensor" in name:
            self._count(args[0].nbytes)
        elif "all_reduce" in name or "allreduce" in name:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self._count(2 * first.nbytes)
        for t in result if isinstance(result, tuple | list) else [result]:
            if type(t) is torch.Tensor and not t.is_meta:  # no wrapper of a result, and no shape without memory
                self._watch(t.untyped_storage(), {"gathered"} if gathers else set())
        return result

    def _count(self, sent: float) -> None:
        self.sent += sent
        self.collectives += 1

    def _watch(self, storage: Any, names: set[str]) -> None:
        if (name := self.names.get(storage.nbytes())) is None or storage._cdata in self.live:
            return
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), names | {name}
        for name in self.peaks:
            if self._now(name) > self.peaks[name]:
                time.sleep(0.02)  # a thread of gloo may keep the tensors of a finished collective a little longer
                self.peaks[name] = max(self.peaks[name], self._now(name))

    def _now(self, name: str) -> int:
        return sum(size for weak, size, names in self.live.values() if name in names and not weak.expired())


def perceptron(width: int, layers: int) -> nn.Sequential:
    """Return a perceptron whose layers have equal sizes, without biases."""
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.Tanh())])


def measure(rank: int, world: int, width: int, layers: int, plain: bool, stay: bool) -> dict[str, float]:
    """Return the counts of one rank."""
    net = perceptron(width, layers)
    if not plain:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in net:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh, reshard_after_forward=not stay)
        fully_shard(net, mesh=mesh)
    backend = bilevel_torch.TorchBackend() if plain else bilevel_torch.Sharded(net)
    torch.manual_seed(1 + rank)
    x, y, x_val, y_val = torch.randn(4, BATCH, width)
    decay = torch.tensor(-5.0, requires_grad=True)
    params: list[Any] = list(net.parameters())

    def inner(predict: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        total: Any = sum((p**2).sum() for p in params)
        return (predict(x) - y).square().mean() + decay.exp() * (total if plain else total.full_tensor())

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        return inner(net), (net(x_val) - y_val).square().mean()

    layer = width * width * 4
    sizes = {"vectors": layer // world} | ({"whole": layer} if world > 1 else {})
    solver = bl.CG(maxiter=PRODUCTS, rtol=None, damping=1.0)
    with Counter(sizes) as counter:
        with nullcontext() if plain else backend.losses():  # pyright: ignore
            both = losses()
        bilevel_torch.hypergradient(*both, params, decay, solver=solver, backend=backend)
    found = {"vectors": counter.peaks["vectors"] / (layer // world * layers) / world}
    found |= {name: counter.peaks.get(name, 0) / layer for name in ("whole", "gathered")}
    if plain:
        return found
    with torch.no_grad():
        at = backend.inner_of(both[0], params, decay)
        v = [torch.ones_like(p) for p in params]
        with Counter(sizes) as counter:
            at.vjp_params(v)
    found |= {"sent": counter.sent / (layer * layers), "collectives": counter.collectives}
    grads = torch.autograd.grad(inner(_by_hand(params)), params, create_graph=True)

    def product() -> None:
        with torch.no_grad():
            at.vjp_params(v)

    def step() -> None:
        net.zero_grad()
        (net(x) - y).square().mean().backward()

    def by_hand() -> None:
        torch.autograd.grad(grads, params, v, retain_graph=True)

    walls, cpus = zip(*[_ratios(product, step, by_hand) for _ in range(REPEATS)], strict=True)
    for name, ratios in (("wall", walls), ("cpu", cpus)):
        found |= {f"{name} {i}": median(some) for i, some in enumerate(zip(*ratios, strict=True))}
    return found


def _by_hand(params: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the perceptron with weights that are gathered once, without hooks of FSDP."""
    whole = [p.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")]) for p in params]

    def predict(x: torch.Tensor) -> torch.Tensor:
        for w in whole:
            x = torch.tanh(nn.functional.linear(x, w))
        return x

    return predict


def _ratios(first: Callable[[], None], *others: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Return the ratios of the wall times and the CPU times of a function and each of some others."""
    walls, cpus = [], []
    for function in (first, *others):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return [walls[0] / wall for wall in walls[1:]], [cpus[0] / cpu for cpu in cpus[1:]]


def run(world: int, arguments: argparse.Namespace, plain: bool = False) -> dict[str, float]:
    """Start the ranks, and return the counts of the first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
        sizes += ["--stay"] * arguments.stay
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
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stay", action="store_true", help="keep the parameters gathered")
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
            found = measure(rank, world, arguments.width, arguments.layers, arguments.plain, arguments.stay)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)  # FSDP keeps the group, whose threads may abort the process while the interpreter ends
    reference = run(1, arguments, plain=True)["vectors"]
    print(f"{arguments.layers} layers, {arguments.layers * arguments.width**2:,} weights. One process: {reference:.2f}")
    print("| ranks | vectors | relative to one process | whole | gathered | sent | collectives | time | CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for world in arguments.ranks:
        r = run(world, arguments)
        counts = [f"{r['vectors']:.2f}", f"{r['vectors'] / reference:.3f}", f"{r['whole']:.1f}", f"{r['gathered']:.1f}"]
        counts += [f"{r['sent']:.2f}", f"{r['collectives']:.0f}"]
        times = [f"{r[f'{name} 0']:.2f}, {r[f'{name} 1']:.2f}" for name in ("wall", "cpu")]
        print(f"| {' | '.join([str(world), *counts, *times])} |", flush=True)


if __name__ == "__main__":
    main()
