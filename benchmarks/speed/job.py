"""Run jobs in this process: python -m benchmarks.speed.job SPECS prints their records as JSON."""

import json
import sys
import warnings
from importlib import import_module

from benchmarks.speed.plan import MARK

JOBS = {  # imported when they run: a process that measures JAX should not hold PyTorch
    "times": "cells:times",
    "memory": "cells:memory",
    "scale": "cells:times",
    "scale memory": "cells:memory",
    "overhead": "overhead:python_time",
    "compile": "overhead:compile_time",
    "import": "overhead:import_time",
    "syncs": "overhead:syncs",
    "joint": "training:joint",
    "joint memory": "training:joint_memory",
    "amortised": "training:amortised",
}


def main() -> None:
    """Run the jobs that are given as JSON."""
    warnings.simplefilter("ignore")  # of the peers
    for spec in json.loads(sys.argv[1]):
        module, _, function = JOBS[spec["job"]].partition(":")
        for record in getattr(import_module(f"benchmarks.speed.{module}"), function)(spec):
            print(MARK + json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
