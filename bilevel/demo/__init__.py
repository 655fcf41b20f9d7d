"""The demo: tune a penalty for every weight of a classifier of handwritten digits."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.config import get_backend, get_solver
from bilevel.demo import data, picture, report
from bilevel.demo.models import mlp, softmax_regression
from bilevel.demo.report import summary
from bilevel.demo.search import Run, Task

__all__ = ["Run", "demo", "summary"]


def demo(
    backend: str = "numpy",
    solver: Any = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: Path = Path(),
) -> Run:
    """Run the demo, print its results, and return them.

    Args:
        backend: "numpy" tunes softmax regression; other backends tune a small network.
        solver: as in `bilevel.hypergradient`; None: the model's default solver.
        options: options of the solver, which override the others.
        seed: the seed of the split of the data and of the network's initial weights.
        out: the folder for the picture, created if it does not exist.

    Raises:
        ImportError: if a package is missing, with the command that installs it.
        ValueError, TypeError: for a backend, solver or option that does not exist.
        SolverError: if a hypergradient is not finite.
        OSError: if the picture cannot be written.
    """
    began = time.perf_counter()
    data.check_installed()
    model, small = (softmax_regression(),) * 2 if backend == "numpy" else (mlp(), mlp(hidden=8))
    solver = get_solver(model.solver if solver is None else solver, **(options or {}))
    framework, digits = get_backend(backend), data.load(seed)
    path = out / f"bilevel-demo-{backend}.png"
    out.mkdir(parents=True, exist_ok=True)

    task, instance = Task(model, digits, framework, seed), Task(small, data.halve(digits), framework, seed)
    print(report.opening(task, backend, solver), flush=True)
    with warnings.catch_warnings(record=True) as caught, _one_thread():
        warnings.simplefilter("always")
        outcome = task.tune(solver)
        errors = instance.errors(solver)
    picture.save(outcome, f"A penalty for each of {outcome.hyperparameters:,} weights of {model.name}", path)
    run = Run(backend, outcome, time.perf_counter() - began, path)

    print(report.scores(model, outcome))
    print(report.verdict(outcome))
    print(report.facts(outcome, instance.size, errors, run.seconds))
    print(f"  picture                    {path}")
    if outcome.failures:
        print(f"\n{outcome.failures} of the {outcome.hypergradients} hypergradients did not converge.")
    for warning in caught:
        print(f"warning: {warning.message}")
    print(flush=True)
    return run


def _one_thread() -> Any:
    """Limit linear algebra to one thread: for matrices this small, several threads wait for each other."""
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    return threadpool_limits(1)
