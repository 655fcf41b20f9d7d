"""What does not grow with the problem: Python's time, imports, compilation, and waits for the device."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.measure import interleave, quartiles
from benchmarks.speed.sizes import TINY

IMPORTS = {  # what is imported, and what has been before
    "bilevel": "",
    "bilevel, after numpy and scipy": "numpy, scipy, scipy.linalg, scipy.sparse.linalg",
    "bilevel_torch, after torch": "torch",
    "bilevel_jax, after jax": "jax, jax.numpy",
}


def python_time(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the time per call and per product of columns on logistic regression of 100 weights."""
    few, many = (2, 4) if spec["quick"] else (10, 50)
    for method in ("cg",) if spec["quick"] else ("neumann", "cg"):
        calls: dict[str, Callable[[], Any]] = {}
        for count in (few, many):
            calls |= {f"{name}/{count}": call for name, call in _tiny(spec["framework"], method, count).items()}
        for call in calls.values():
            call()
        seconds = interleave(calls, spec["budget"], most=400)
        result = {}
        for name in dict.fromkeys(key.rpartition("/")[0] for key in calls):
            short, long = seconds[f"{name}/{few}"], seconds[f"{name}/{many}"]
            per_product = [(b - a) / (many - few) for a, b in zip(short, long, strict=True)]
            fixed = [a - few * p for a, p in zip(short, per_product, strict=True)]
            result[name] = {
                "fixed": quartiles(fixed), "per_product": quartiles(per_product), "seconds": quartiles(short)
            }  # fmt: skip
        yield {
            "kind": "overhead", "framework": spec["framework"], "method": method, "count": few, "columns": result,
        }  # fmt: skip


def _tiny(framework: str, method: str, count: int) -> dict[str, Callable[[], Any]]:
    if framework == "torch":
        from benchmarks.speed.torch_columns import columns
        from benchmarks.speed.torch_workloads import workload

        return columns(workload("logistic", TINY), method, count)
    from benchmarks.speed.jax_columns import columns as jax_columns
    from benchmarks.speed.jax_columns import functions
    from benchmarks.speed.jax_workloads import workload as jax_workload

    w = jax_workload("logistic", TINY)
    made = functions(w, method, count)
    return jax_columns({name: made[name] for name in ("hand-written", "ours")}, w)


def compile_time(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the seconds until JAX has traced and compiled a hypergradient, in a fresh cache each time."""
    import jax

    from benchmarks.speed.cells import size_of
    from benchmarks.speed.jax_columns import functions
    from benchmarks.speed.jax_workloads import workload

    w = workload(spec["workload"], size_of(spec))
    for method in ("cg",) if spec["quick"] else ("neumann", "cg"):

        def compiling(name: str, method: str = method) -> Callable[[], Any]:
            def run() -> Any:
                jax.clear_caches()
                return jax.jit(functions(w, method, 10)[name]).lower(*w.point).compile()

            return run

        calls = {name: compiling(name) for name in ("hand-written", "ours")}
        seconds = interleave(calls, spec["budget"], least=1 if spec["quick"] else 3)
        yield {
            "kind": "compile", "framework": "jax", "workload": spec["workload"], "method": method, "count": 10,
            "columns": {name: {"seconds": quartiles(values)} for name, values in seconds.items()},
        }  # fmt: skip


def import_time(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the seconds that imports take, each in processes of its own."""
    program = "import time{};t=time.perf_counter();import {};print(time.perf_counter()-t)"
    for name, before in IMPORTS.items():
        package = name.partition(",")[0]
        framework = package.rpartition("_")[2]
        if framework in ("torch", "jax") and framework not in spec["frameworks"]:
            continue
        code = program.format(f",{before}" if before else "", package)
        runs = [_run(code) for _ in range(1 if spec["quick"] else 5)]
        yield {"kind": "import", "what": name, "seconds": quartiles(runs)}


def _run(code: str) -> float:
    return float(json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout))


def syncs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield how often a hypergradient in PyTorch reads a number from the device, per call and per product."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import bilevel as bl
    import bilevel_torch
    from benchmarks.speed.torch_workloads import workload

    class Counting(TorchDispatchMode):
        """Counts the reads."""

        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    w = workload("logistic", TINY, spec["device"])
    few, many = 16, 48
    backends = {"as on the CPU": bilevel_torch.TorchBackend()}
    backends |= {"as on a GPU": bilevel_torch.TorchBackend(check_every=8)}
    for where, backend in backends.items():
        for method in ("neumann", "cg"):
            reads = []
            for count in (few, many):
                solver = (
                    bl.Neumann(count, w.step_size)
                    if method == "neumann"
                    else bl.CG(maxiter=count, rtol=None, damping=0.0)
                )
                inner, outer = w.inner_loss(), w.outer_loss()
                with Counting() as counting:
                    bilevel_torch.hypergradient(
                        inner, outer, w.params, w.log_decays, solver=solver, backend=backend, on_failure="ignore"
                    )
                reads.append(counting.reads)
            per_product = (reads[1] - reads[0]) / (many - few)
            yield {
                "kind": "syncs", "where": where, "method": method, "per_product": per_product,
                "fixed": reads[0] - few * per_product,
            }  # fmt: skip
