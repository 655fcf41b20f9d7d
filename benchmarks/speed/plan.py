"""What there is to run, as jobs for processes of their own."""

from typing import Any

from benchmarks.speed.cells import HAND, OURS, STEP, UNROLLED_STEPS
from benchmarks.speed.sizes import WORKLOADS

Spec = dict[str, Any]
MARK = "RECORD "  # in front of a record that a job prints, among whatever else a library prints
IMPLICIT = ("neumann", "cg")
IN_PLACE = f"{HAND}, in place"
COLUMNS = {  # whose memory is measured; those that are not installed drop out
    ("torch", "implicit"): (STEP, HAND, IN_PLACE, OURS, "ours, functions", "TorchOpt", "Betty"),
    ("torch", "unrolled"): (HAND, OURS, "ours, iterates", "ours, checkpoints", "TorchOpt", "higher"),
    ("jax", "implicit"): (STEP, HAND, OURS, "JAXopt", "Lineax", "Optimistix"),
    ("jax", "unrolled"): (HAND, f"{HAND}, remat", OURS, "ours, checkpoints", "JAXopt", "Optimistix"),
}
GROWTH = (HAND, OURS, "ours, checkpoints")  # whose memory is measured at four times the steps, too
MANY_STEPS = 4 * UNROLLED_STEPS
EVERYWHERE = ("logistic", "mlp")  # where the peers take part with 100 products, too
MILLIONS = (1, 10, 100)
SCALE_PRODUCTS = 3


def plan(frameworks: list[str], quick: bool, device: str, budget: float, data: str | None) -> list[list[Spec]]:
    """Return groups of jobs; each group runs in one process.

    Args:
        frameworks: of "torch" and "jax", those that are installed.
        quick: tiny sizes, few cells, and few processes.
        device: "cpu" or "cuda".
        budget: seconds for each table cell's rounds; at least three rounds are run.
        data: where MNIST is; None: without it.
    """
    common = {"quick": quick, "device": device, "budget": budget, "data": data, "frameworks": frameworks}
    groups: list[list[Spec]] = []
    for framework in frameworks:
        of = common | {"framework": framework}
        timed = [_times(of, workload, quick) for workload in WORKLOADS]
        fixed = [of | {"job": "overhead"}]
        if framework == "jax":
            fixed += [of | {"job": "compile", "workload": name} for name in EVERYWHERE[: 1 if quick else 2]]
        else:
            fixed += [of | {"job": "syncs"}, of | {"job": "joint"}, of | {"job": "amortised"}]
        groups += [timed + fixed] if quick else [[job] for job in timed + fixed]
        groups += [[job] for job in _memory(of, framework, quick) + _scale(of, framework, quick)]
    if "torch" in frameworks and device == "cpu":
        groups += [[common | {"job": "joint memory", "column": name}] for name in ("standard", "joint")]
    return [*groups, [common | {"job": "import"}]]


def _times(of: Spec, workload: str, quick: bool) -> Spec:
    products = (3,) if quick else (10, 100)
    if (framework := of["framework"]) == "jax" and workload == "convnet":
        products = products[:1]  # convolutions in XLA's loops on the CPU: nothing more to see, and it takes minutes
    cells = [(m, k) for k in products for m in IMPLICIT] + [("unrolled", UNROLLED_STEPS)]
    job = of | {"job": "times", "workload": workload, "cells": cells, "peers_always": workload in EVERYWHERE}
    if quick and framework == "jax":  # which compiles for each
        job["cells"] = cells[1:] if workload == "logistic" else [("cg", 3)]
    if quick and workload != "logistic":
        job |= {"cells": [("cg", 3)], "columns": [STEP, HAND, OURS]}
    return job


def _memory(of: Spec, framework: str, quick: bool) -> list[Spec]:
    def job(workload: str, method: str, count: int, column: str) -> Spec:
        return of | {"job": "memory", "workload": workload, "cells": [(method, count)], "column": column}

    if quick:
        return [job("mlp", "cg", 3, column) for column in (HAND, OURS)]
    cells = [("mlp", "neumann"), ("mlp", "cg"), ("convnet", "cg"), ("mlp", "unrolled")]
    jobs = [
        job(workload, method, UNROLLED_STEPS if method == "unrolled" else 10, column)
        for workload, method in cells
        for column in COLUMNS[framework, "unrolled" if method == "unrolled" else "implicit"]
        if not (framework == "jax" and method == "neumann" and column not in (STEP, HAND, OURS))
    ]
    return jobs + [job("mlp", "unrolled", MANY_STEPS, column) for column in GROWTH]


def _scale(of: Spec, framework: str, quick: bool) -> list[Spec]:
    if quick:
        return []
    hands = [IN_PLACE, HAND] if framework == "torch" else [HAND]
    jobs = []
    for millions in MILLIONS:
        for method in IMPLICIT if millions < MILLIONS[-1] else ("cg",):  # where each takes long
            job = of | {"workload": "mlp", "millions": millions, "cells": [(method, SCALE_PRODUCTS)]}
            jobs.append(job | {"job": "scale", "columns": [*hands, OURS]})
            jobs += [job | {"job": "scale memory", "column": column} for column in (hands[0], OURS)]
    return jobs
