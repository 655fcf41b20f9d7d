"""Time, memory and trust of metagradients: ratios in one run.

OMP_NUM_THREADS=1 python -m benchmarks.metagradients          # all tables but the last two, in some minutes
OMP_NUM_THREADS=1 python -m benchmarks.metagradients torch    # one of: torch, maml, jax, jax-memory, long, trust, lds

Run it alone. `.venv-peers` (see the Makefile) also has TorchOpt and higher.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.metagradients import long_run
from benchmarks.speed.measure import as_arrays, interleave, peak_memory, quartiles, relative_error


def main(names: list[str]) -> None:
    """Print the tables."""
    tables: dict[str, Callable[[], None]] = {
        "torch": in_torch,
        "maml": maml,
        "jax": in_jax,
        "jax-memory": jax_memory,
        "long": long_run.main,
        "trust": trust,
        "lds": lds,
    }
    for name in names or [name for name in tables if name not in ("trust", "lds")]:
        print(f"## {name}\n", flush=True)
        tables[name]()
        print(flush=True)


def table(columns: Mapping[str, Callable[[], Any]], baseline: str, budget: float, checked: bool = True) -> None:
    """Print times relative to a column, and differences of the results to it."""
    results = {
        name: as_arrays(answer if isinstance(answer := call(), list) else [answer]) for name, call in columns.items()
    }
    seconds = {name: np.asarray(values) for name, values in interleave(columns, budget, least=5).items()}
    print(f"| | time, {baseline} = 1 | quartiles | difference |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        low, middle, high = quartiles(values / seconds[baseline])
        same = checked and results[name][0].shape == results[baseline][0].shape
        error = f"{relative_error(results[name], results[baseline]):.0e}" if same else ""
        print(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} | {error} |", flush=True)
    print(f"\n{baseline}: {1e3 * np.median(seconds[baseline]):.0f} ms, {len(seconds[baseline])} rounds.")


def in_torch() -> None:
    """Time a run of 160 steps of momentum on the digits."""
    import torch

    from benchmarks.metagradients.torch_runs import Digits

    torch.set_num_threads(1)
    digits = Digits()
    columns: dict[str, Callable[[], Any]] = {
        "by hand": digits.by_hand,
        "training": digits.train,
        **{f'"{c}"': partial(digits.ours, checkpoints=c) for c in ("none", "sqrt", "log", "all")},
        "TrainingStep, none": digits.module,
        "20 queries": lambda: digits.ours(digits.each, checkpoints="none"),
    }
    columns |= {peer: getattr(digits, peer) for peer in ("torchopt", "higher") if find_spec(peer)}
    table({name: partial(as_list, call) for name, call in columns.items()}, "by hand", 60)


def as_list(call: Callable[[], Any]) -> list[Any]:
    """Return the result of a call as a list of arrays."""
    answer = call()
    return answer if isinstance(answer, list) else [answer]


def maml() -> None:
    """Time three steps of MAML."""
    import torch

    from benchmarks.metagradients.torch_runs import maml

    torch.set_num_threads(1)
    table(maml(), "by hand", 20)


def in_jax() -> None:
    """Time runs of Adam in JAX."""
    from benchmarks.metagradients.jax_runs import Digits

    for steps in (160, 1000):
        digits = Digits(steps)
        columns: dict[str, Callable[[], Any]] = {"training": digits.train}
        columns |= {f"{way} by hand": partial(digits.by_hand, way) for way in digits.compiled}
        columns |= {f'"{c}"': partial(digits.ours, checkpoints=c) for c in ("none", "sqrt", "log")}
        columns |= {"20 queries, sqrt": partial(digits.ours, digits.each, checkpoints="sqrt")}
        print(f"{steps} steps, 64-32-10\n")
        table({name: partial(as_list, call) for name, call in columns.items()}, "remat by hand", 20)


LARGE = (64, 512, 256, 10)


def jax_memory() -> None:
    """Print the peak memory of 200 steps of Adam on 170,000 weights. Each way runs in a separate process."""
    for way in ("remat", "nested", "none", "sqrt", "log"):
        command = [sys.executable, "-c", f"from benchmarks.metagradients.__main__ import peak; peak({way!r})"]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="", flush=True)


def peak(way: str) -> None:
    """Print the peak memory of one way."""
    import jax

    from benchmarks.metagradients.jax_runs import Digits

    digits = Digits(200, LARGE, batch=50)
    state = sum(a.nbytes for a in jax.tree.leaves(digits.first))

    def call() -> Any:
        return digits.by_hand(way) if way in digits.compiled else digits.ours(checkpoints=way)

    call()  # compiles
    print(f"{way}: {peak_memory(lambda: None, call) / state:.1f} states of {state / 1e6:.1f} MB")


def trust() -> None:
    """Rank runs by their reports."""
    import jax

    from benchmarks.metagradients import trust

    jax.config.update("jax_enable_x64", True)
    trust.main()


def lds() -> None:
    """Print the linear datamodeling scores of metagradients for three seeds."""
    import jax

    from benchmarks.metagradients.trust import SMOOTH, row

    jax.config.update("jax_enable_x64", True)
    for name, training in SMOOTH:
        found = [row(name, replace(training, seed=seed))["lds"] for seed in range(3)]
        print(f"{name}, {training}: {', '.join(f'{x:.3f}' for x in found)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
