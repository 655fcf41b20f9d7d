"""How near hypergradients come to the peaks of the machine, in PyTorch on one thread of a CPU.

OMP_NUM_THREADS=1 python -m benchmarks.roofline            # some two minutes
OMP_NUM_THREADS=1 python -m benchmarks.roofline --quick    # tiny sizes

Two peaks are measured: the operations per second of a product of large matrices, and the bytes per second of a sum of
large vectors. The least time of a call is the time of its matrix products and convolutions at the first peak, plus the
time of the solver's vectors at the second. A step of CG passes eleven vectors like params: p·Ap reads two, and the
updates of x, r and p each read two and write one. All other operations are left out, so no loop can be as fast.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import torch_columns
from benchmarks.speed.measure import interleave
from benchmarks.speed.sizes import FULL, TINY
from benchmarks.speed.torch_workloads import workload

PRODUCTS, PASSES = 10, 11


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each call, in seconds."""
    for call in calls.values():
        call()
    return [median(values) for values in interleave(calls, 0.0, least=rounds).values()]


def peaks(size: int, rounds: int) -> tuple[float, float]:
    """Return operations per second of matrix products, and bytes per second of vectors."""
    a, b, c = (torch.randn(size, size) for _ in range(3))
    x, y = torch.randn(8 * size**2), torch.randn(8 * size**2)
    calls = {"product": lambda: torch.mm(a, b, out=c), "sum": lambda: x.add_(y)}
    per_product, per_sum = medians(calls, rounds)
    return 2 * size**3 / per_product, 3 * x.nbytes / per_sum  # a sum reads two vectors, and writes one


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(argv).quick
    torch.set_num_threads(1)
    rounds = 2 if quick else 9
    flops, bandwidth = peaks(64 if quick else 1536, rounds)
    print(f"Peaks: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    print("| network | GFLOP | MB of vectors | least time | by hand | ours |\n|---|---|---|---|---|---|")
    names = ["logistic"] if quick else ["logistic", "mlp", "convnet", "lstm", "transformer"]
    for name in names:
        w = workload(name, TINY if quick else FULL[name])
        columns = torch_columns.columns(w, "cg", PRODUCTS)
        with FlopCounterMode(display=False) as counter:
            columns["hand-written"]()
        work, moved = counter.get_total_flops(), PASSES * PRODUCTS * sum(p.nbytes for p in w.params)
        least = work / flops + moved / bandwidth
        hand, ours = medians({column: columns[column] for column in ("hand-written, in place", "ours")}, rounds)
        print(
            f"| {name} | {work / 1e9:.2f} | {moved / 1e6:.1f} | {1e3 * least:.1f} ms | {hand / least:.2f} | "
            f"{ours / least:.2f} |"
        )


if __name__ == "__main__":
    main()
