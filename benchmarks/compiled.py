"""Times of `bilevel_torch.Compiled`, as multiples of the times of the ordinary backend in the same run.

OMP_NUM_THREADS=1 python -m benchmarks.compiled            # some ten minutes, mostly compiling; run it alone
OMP_NUM_THREADS=1 python -m benchmarks.compiled --quick    # tiny sizes
"""

import argparse
import time
from functools import partial
from itertools import product

import numpy as np
import torch

import bilevel as bl
import bilevel_torch
from benchmarks.speed.measure import interleave, quartiles
from benchmarks.speed.sizes import FULL, TINY
from benchmarks.speed.torch_columns import ours
from benchmarks.speed.torch_workloads import Workload, workload

FEW, MANY = 5, 45  # products


def row(name: str, w: Workload, rounds: int, compiler: str) -> str:
    """Return a row of the table."""
    backends = {"eager": bilevel_torch.backend, "compiled": bilevel_torch.Compiled(compiler)}
    solvers = {count: bl.Neumann(terms=count, step_size=w.step_size) for count in (FEW, MANY)}
    start = time.perf_counter()
    ours(w, solvers[FEW], backends["compiled"])
    first = time.perf_counter() - start
    calls = {
        f"{kind} {count}": partial(ours, w, solvers[count], backends[kind])
        for kind, count in product(backends, solvers)
    }
    for call in calls.values():
        call()
    seconds = {column: np.asarray(values) for column, values in interleave(calls, 0.0, least=rounds).items()}
    per_product = {kind: seconds[f"{kind} {MANY}"] - seconds[f"{kind} {FEW}"] for kind in backends}
    ratios = per_product["compiled"] / per_product["eager"], seconds[f"compiled {FEW}"] / seconds[f"eager {FEW}"]
    cells = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles(values)) for values in ratios]
    return f"| {name} | {' | '.join(cells)} | {first:.0f} s |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compiler", default="inductor", help="a backend of torch.compile (default: %(default)s)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"| network | product, compiled / autograd | call with {FEW} products | first call |\n|---|---|---|---|")
    sizes = (
        {"mlp": TINY} if given.quick else {name: FULL[name] for name in ("logistic", "mlp", "convnet", "transformer")}
    )
    for name, size in sizes.items():
        print(row(name, workload(name, size), 3 if given.quick else 15, given.compiler), flush=True)


if __name__ == "__main__":
    main()
