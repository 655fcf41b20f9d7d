"""Run the benchmark: each job in a process of its own, one after the other; write JSON and the table in RESULTS.md.

python -m benchmarks.speed             # everything that is installed, some 25 minutes on two quiet cores
python -m benchmarks.speed --quick     # a smoke test: tiny sizes, nothing is written but what is asked for
make bench                             # with the peers, in an environment of their own
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.speed import chart, report
from benchmarks.speed.measure import FRUGAL_MALLOC, machine
from benchmarks.speed.plan import MARK, plan

HERE = Path(__file__).parents[1]
PACKAGES = (
    "numpy", "scipy", "torch", "jax", "jaxlib", "torchopt", "betty-ml", "higher", "jaxopt", "lineax", "optimistix",
)  # fmt: skip


def main() -> int:
    """Parse the arguments, and run; return 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints the tables, does not touch RESULTS.md")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--frameworks", nargs="+", default=["torch", "jax"], choices=["torch", "jax"])
    parser.add_argument("--only", nargs="+", metavar="JOB", help="kinds of jobs, such as times or memory")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for the rounds of each cell (default: 3)")
    parser.add_argument("--data", metavar="DIR", help="where MNIST's idx files are, for the amortised outer step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/speed-DEVICE.json")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="default: RESULTS.md; between its markers")
    parser.add_argument("--from-json", action="store_true", help="run nothing: make the tables of an earlier run anew")
    options = parser.parse_args()
    partial = options.quick or options.only or options.frameworks != ["torch", "jax"]
    json_file = options.json or (None if partial else HERE / "results" / f"speed-{options.device}.json")
    tables_file = options.tables or (None if partial else HERE / "RESULTS.md")
    if options.from_json:
        result = json.loads((options.json or HERE / "results" / f"speed-{options.device}.json").read_text())
    else:
        result = run(options)
        if json_file:
            json_file.parent.mkdir(exist_ok=True)
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    text = report.markdown(result)
    if not partial:
        chart.save(result["records"], HERE.parent / "docs" / f"speed-{options.device}.png")
    if tables_file:
        tables_file.write_text(report.between_markers(tables_file.read_text(), text, options.device))
    else:
        print(text)
    return int(any(record["kind"] == "failed" for record in result["records"]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the jobs; return what they said, and on what they ran."""
    frameworks = [name for name in options.frameworks if find_spec(name)]
    start, load = time.perf_counter(), os.getloadavg()[0]
    if load > 0.5 and not options.quick:
        print(f"The load average is {load:.1f}: times will mean little. Wait until the machine is quiet.")
    records: list[dict[str, Any]] = []
    budget = 0.0 if options.quick else options.budget
    groups = plan(frameworks, options.quick, options.device, budget, options.data)
    if options.only:
        groups = [kept for group in groups if (kept := [job for job in group if job["job"] in options.only])]
    for i, group in enumerate(groups, 1):
        before = time.perf_counter()
        records += run_group(group)
        about = [group[0].get(key) for key in ("job", "framework", "workload", "millions", "column", "cells")]
        took = time.perf_counter() - before
        print(f"{i}/{len(groups)} {took:5.1f} s ", *(str(a) for a in about if a is not None), flush=True)
    return {
        "about": {
            "date": datetime.date.today().isoformat(),
            "machine": machine() | {"load_before": round(load, 2)},
            "device": options.device,
            "accelerator": accelerator(options.device),
            "versions": {"python": platform.python_version()} | installed(),
            "quick": options.quick,
            "minutes": round((time.perf_counter() - start) / 60, 1),
        },
        "records": records,
    }


def run_group(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs in one process; return their records, and one that says so if it failed."""
    env = os.environ | {"JAX_ENABLE_X64": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if group[0]["quick"]:  # what takes long at tiny sizes: threads that wait for each other, and compiling
        env |= {"OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if group[0]["device"] == "cpu":
        env |= {"JAX_PLATFORMS": "cpu"}
        env |= FRUGAL_MALLOC if "memory" in group[0]["job"] else {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.job", json.dumps(group)],
        env=env, cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    records = [json.loads(line.removeprefix(MARK)) for line in lines]
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        records.append({"kind": "failed", "jobs": [job["job"] for job in group], "error": last[:300]})
    return records


def installed() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def accelerator(device: str) -> str | None:
    """Return the name of the GPU's model."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
