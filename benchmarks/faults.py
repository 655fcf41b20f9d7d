"""Inject faults into ranks, and measure how and when all ranks end. Processes with gloo on the CPU.

    python -m benchmarks.faults
    python -m benchmarks.faults --cases "DataParallel, 2 ranks: kill in a product"

Each case starts ranks with a timeout of the group of a few seconds. A fault occurs on the last rank only. A case passes
if each rank with a fault or without one ends in time, and the error of each rank that lives names the rank, or the
setting that differs. The row has the time from the fault until the last rank without it has ended.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
import bilevel_torch
from bilevel.operators.linear_operator import LinearOperator

TIMEOUT = 4.0  # of the group, in seconds
STALL = 3.0  # of a stalled rank, in timeouts
FAULTS = {
    "kill at the start": r"no answer from rank {last} in .* died",
    "kill in a product": r"no answer from rank {last} in .* died",
    "kill in the second call": r"no answer from rank {last} in .* died",
    "stall": r"no answer from rank {last} in .* stuck",
    "error in a product": r"rank {last} has raised MemoryError",
    "nan in the loss": r"On rank {last}: The inner loss is nan",
    "nan in the gradient": r"On rank {last}: .*gradient.* is nan",
    "nan in a product": r"On rank {last}: .* products? with .* nan",
    "nan in the data": r"On rank {last}: The outer loss is nan",
    "shape": r"hparams are other tensors on rank {odd}",
    "solver": r"the solver.* differ between the ranks: rank {odd}",
    "seed": r"(hparams|params) are not the same on all ranks: rank {odd}",
}
"""The faults, and a pattern of the error of each rank."""

CASES = [(backend, 2, fault) for backend in ("DataParallel", "Sharded") for fault in FAULTS]
CASES += [(backend, 4, fault) for backend in ("DataParallel", "Sharded") for fault in ("kill in a product", "stall")]
CASES += [("DataParallel", 4, "seed"), ("Sharded", 4, "nan in the gradient")]


@contextmanager
def in_the_third_product(action: Callable[[], None]) -> Iterator[None]:
    """Call a function before the third product of the solver."""
    own, calls = LinearOperator.__call__, count(1)

    def product(self: Any, v: Any) -> Any:
        if next(calls) == 3:
            action()
        return own(self, v)

    with patch.object(LinearOperator, "__call__", product):
        yield


def rank_with(fault: str | None, kind: str, rank: int, world: int, at: Path) -> None:
    """Compute two hypergradients on a rank, with a fault."""

    def happens() -> None:
        at.write_text(str(time.time()))

    def die() -> None:
        happens()
        os._exit(3)

    def stall() -> None:
        happens()
        time.sleep(STALL * TIMEOUT)

    def run_out_of_memory() -> None:
        happens()
        raise MemoryError("no memory for a test")

    torch.manual_seed(1 if fault == "seed" else 0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    decay = torch.full(
        (2,) if fault == "shape" else (), -2.0 - torch.rand(()).item(), dtype=torch.float64
    ).requires_grad_()
    if kind == "Sharded":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh)
    generator = torch.Generator().manual_seed(rank)
    x, x_val = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    y, y_val = torch.randint(3, (2, 8), generator=generator)
    if fault == "nan in the data":
        x_val[3, 1] = float("nan")
    backend = getattr(bilevel_torch, kind)(*[net] * (kind == "Sharded"))

    def inner() -> Any:
        outputs = net(x)
        loss = cross_entropy(outputs, y)
        penalty: Any = sum((p**2).sum() for p in net.parameters())
        if fault == "nan in the loss":
            loss = loss * float("nan")
        # The graphs of all ranks have the same operations, as FSDP needs it.
        zero = fault in ("nan in the gradient", "nan in a product")
        loss = loss + ((outputs * 0).sum() + (0.0 if zero else 1.0)) ** (1.5 if fault == "nan in a product" else 0.5)
        return loss + decay.exp().mean() * (penalty.full_tensor() if kind == "Sharded" else penalty)

    def call() -> None:
        with backend.losses() if kind == "Sharded" else nullcontext():
            losses = inner(), cross_entropy(net(x_val), y_val)
        solver = bl.CG(damping=5.0 if fault == "solver" else 4.0, rtol=1e-10)
        bilevel_torch.backward(
            *losses, net.parameters(), decay, solver=solver, backend=backend, on_failure="raise", accumulate=False
        )

    dist.barrier()
    happens() if fault else None
    if fault == "kill at the start":
        die()
    actions = {"kill in a product": die, "stall": stall, "error in a product": run_out_of_memory}
    if fault in actions:
        with in_the_third_product(actions[fault]):
            call()
    call()
    if fault == "kill in the second call":
        with in_the_third_product(die):
            call()
    call()


def main_of_rank(arguments: argparse.Namespace) -> None:
    """Run one rank, and write its error and the time of its end."""
    rank, world, folder = int(arguments.rank), int(arguments.world), Path(arguments.folder)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    said = "no error"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fault = arguments.fault if rank == world - 1 else None
            rank_with(fault, arguments.backend, rank, world, folder / "fault")
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps({"said": said, "end": time.time()}))
    os._exit(0)


def inject(backend: str, world: int, fault: str) -> tuple[list[str], float]:
    """Return what each rank says, and the seconds from the fault until the ranks without it have ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.faults", "--folder", name, "--world", str(world)]
        command += ["--backend", backend, "--fault", fault]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, stderr=subprocess.DEVNULL)
            for rank in range(world)
        ]
        for process in processes:
            process.wait(120)
        files = {rank: folder / f"{rank}.json" for rank in range(world)}
        found = {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}
        said = [found[rank]["said"] if rank in found else "dead" for rank in range(world)]
        end = max(one["end"] for rank, one in found.items() if rank < world - 1)
        return said, end - float((folder / "fault").read_text())


def passes(world: int, fault: str, said: list[str], seconds: float) -> bool:
    """Return whether all ranks have ended in time, with errors that name the rank."""
    # Two ranks have no majority. Then the error names the second one.
    pattern = FAULTS[fault].format(last=world - 1, odd=world - 1)
    lived = [text for text in said if text != "dead"]
    right = [re.search(pattern, text) or text.startswith("MemoryError") for text in lived]
    return all(right) and len(lived) >= world - 1 and seconds < 2 * TIMEOUT + 1


def main() -> None:
    """Print a table, or run one rank."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cases", nargs="+", help="names as in the table")
    for option in ("--rank", "--world", "--folder", "--backend", "--fault"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        main_of_rank(arguments)
    passed = total = 0
    print("| case | passes | seconds | error of the first rank | error of the last rank |")
    print("| --- | --- | --- | --- | --- |")
    for backend, world, fault in CASES:
        name = f"{backend}, {world} ranks: {fault}"
        if arguments.cases and name not in arguments.cases:
            continue
        said, seconds = inject(backend, world, fault)
        good = passes(world, fault, said, seconds)
        passed, total = passed + good, total + 1
        texts = [said[i].replace("\n", " ").replace("|", "")[:170] for i in (0, -1)]
        print(f"| {name} | {'yes' if good else 'NO'} | {seconds:.1f} | {texts[0]} | {texts[1]} |", flush=True)
    print(f"{passed} of {total}")


if __name__ == "__main__":
    main()
