"""Hessian-vector products of `bilevel_torch.Compiled` against those of autograd: CPU time, as ratios in one run.

OMP_NUM_THREADS=1 python -m benchmarks.compiled            # some ten minutes, mostly compiling
OMP_NUM_THREADS=1 python -m benchmarks.compiled --quick    # tiny sizes
"""

import argparse
import time
from statistics import median, quantiles

import torch

import bilevel as bl
import bilevel_torch
from benchmarks.speed.sizes import FULL, TINY
from benchmarks.speed.torch_workloads import Workload, workload

FEW, MANY = 5, 45  # products


def call(w: Workload, backend: bilevel_torch.TorchBackend, count: int) -> float:
    """Return the CPU seconds of a hypergradient with some products."""
    start = time.process_time()
    bl.hypergradient(
        bl.Problem(w.inner, w.outer), {k: p.detach() for k, p in w.net.named_parameters()}, w.log_decays,
        inner_args=w.train, outer_args=w.val, solver=bl.Neumann(terms=count, step_size=w.step_size),
        on_failure="ignore", backend=backend,
    )  # fmt: skip
    return time.process_time() - start


def row(name: str, w: Workload, rounds: int, compiler: str) -> str:
    """Return a row of the table."""
    eager, compiled = bilevel_torch.backend, bilevel_torch.Compiled(compiler)
    call(w, eager, FEW)
    start = time.perf_counter()
    call(w, compiled, FEW)
    first = time.perf_counter() - start
    products, calls = [], []
    for _ in range(rounds):
        seconds = [(call(w, backend, FEW), call(w, backend, MANY)) for backend in (eager, compiled)]
        of_eager, of_compiled = ((many - few) / (MANY - FEW) for few, many in seconds)
        products.append(of_compiled / of_eager)
        calls.append(seconds[1][0] / seconds[0][0])
    return f"| {name} | {spread(products)} | {spread(calls)} | {first:.0f} s |"


def spread(ratios: list[float]) -> str:
    """Return the median and the quartiles."""
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f})"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compiler", default="inductor", help="a backend of torch.compile (default: %(default)s)")
    given = parser.parse_args(argv)
    quick = given.quick
    torch.set_num_threads(1)
    print(f"| network | product, compiled / autograd | call with {FEW} products | first call |\n|---|---|---|---|")
    sizes = {"mlp": TINY} if quick else {name: FULL[name] for name in ("logistic", "mlp", "convnet", "transformer")}
    for name, size in sizes.items():
        print(row(name, workload(name, size), 2 if quick else 9, given.compiler), flush=True)


if __name__ == "__main__":
    main()
