"""Measure how right hypergradients are on networks whose training has not ended at a minimum.

    python -m benchmarks.attribution                     # some 15 minutes on a busy core
    python -m benchmarks.attribution --quick             # a minute, too small to mean much
    python -m benchmarks.attribution --from-json FILE    # print the tables again

Five networks on scikit-learn's digits, with a weight λᵢ = 1 for each training example. They are trained for 40, 160 and
600 steps. The truth is the derivative of the validation loss by λ through the whole run, by reverse mode in float64.
The tables show the cosine of each hypergradient to the truth, and how well it predicts retrainings without 5 % of the
examples. They also show which cheap measures tell the cosine.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.attribution import cosines, lds, report
from benchmarks.attribution.networks import NETWORKS
from benchmarks.attribution.runs import Training

RATES = {"momentum": 0.05, "adam": 0.003}
QUICK = "attention"  # the smallest network


def settings(quick: bool) -> Iterator[tuple[str, Training]]:
    """Yield networks and trainings: momentum from two seeds, Adam from one."""
    for name in [QUICK] if quick else NETWORKS:
        for optimizer, seed in (("momentum", 0), ("adam", 0), ("momentum", 1))[: 1 if quick else 3]:
            for steps in (20, 40) if quick else (40, 160, 600):
                yield name, Training(steps, optimizer, RATES[optimizer], seed=seed)


def measure(quick: bool) -> dict[str, Any]:
    """Run the benchmark, and return what was measured."""
    start = time.perf_counter()
    records = []
    for name, training in settings(quick):
        before = time.perf_counter()
        records.append(cosines.compare(name, training, examples=200 if quick else 600))
        print(f"{time.perf_counter() - before:5.1f} s  {name}, {training}", flush=True)
    if quick:
        scores = [lds.compare(QUICK, Training(20, batch=200), runs=10, count=3, examples=200)]
    else:
        scores = [lds.compare("MLP, tanh", Training(160, batch=600))]
        scores += [lds.compare(name, Training(160)) for name in ("MLP, tanh", "MLP, ReLU", "convnet")]
    packages = ("numpy", "scipy", "jax", "scikit-learn")
    return {
        "about": {
            "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "quick": quick,
            "minutes": round((time.perf_counter() - start) / 60, 1),
        },
        "cosines": records,
        "scores": scores,
    }


def main() -> None:
    """Parse the arguments, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small runs")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--from-json", type=Path, help="file to read results from, instead of measuring")
    arguments = parser.parse_args()
    if arguments.from_json:
        result = json.loads(arguments.from_json.read_text())
    else:
        jax.config.update("jax_enable_x64", True)
        result = measure(arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    report.show(result)


if __name__ == "__main__":
    main()
