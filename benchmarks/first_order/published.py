"""Race the solvers of benchmark_bilevel on its task of data cleaning: test error against CPU time.

The task is its own: MNIST with 20,000 images to train on, half of the labels random, 5,000 for validation and 10,000
for tests, and a linear model with a weight for each image. Its files are imported from a checkout (github.com/benchopt/
benchmark_bilevel), and its solvers have the parameters of its file datacleaning0_5_best_params.yml. Stand-ins replace
the few names of benchopt that they import. "ours" is `bl.hypergradient` after each training step on the same functions,
batches and initial values: one Neumann term ("tracked") or three steps of CG, both from the last adjoint, and Adam.
Compilation is not part of the time. Printed for each solver: the mean test error and its standard error at some times.

    OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false \
        python -m benchmarks.first_order.published --repository DIR --data DIR [--seconds 20] [--seeds 5]
"""

import argparse
import contextlib
import importlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
import data

PUBLISHED: dict[str, dict[str, Any]] = {
    "SABA": {"step_size": 0.1, "outer_ratio": 1e-3},
    "SRBA": {"step_size": 1e-3, "outer_ratio": 1e-5, "period_frac": 512.0},
    "StocBiO": {"step_size": 1e-2, "outer_ratio": 1e-5, "n_inner_steps": 10, "n_shia_steps": 10},
    "AmIGO": {"step_size": 1e-3, "outer_ratio": 1e-5, "n_inner_steps": 10},
    "SOBA": {"step_size": 1.0, "outer_ratio": 1e-4},
}
OURS = {
    "ours, tracked": bl.Neumann(terms=1, step_size=0.05),
    "ours, CG": bl.CG(maxiter=3, rtol=None),
}
RATE, OUTER_RATE, BATCH, BLOCK = 3e-4, 0.1, 64, 128
Point = tuple[float, float]  # CPU seconds and test error


class Base:
    """The part of a solver of benchopt that the files need."""

    def run_once(self, number: int) -> None:
        """Run some blocks of steps, to compile them."""
        calls = iter(range(number))
        self.run(lambda: next(calls, None) is not None)  # type: ignore[attr-defined]


def stand_ins() -> dict[str, Any]:
    """Return modules with the names of benchopt that the files import."""
    benchopt, stopping = ModuleType("benchopt"), ModuleType("benchopt.stopping_criterion")
    vars(benchopt).update(BaseSolver=Base, BaseDataset=object, safe_import_context=contextlib.nullcontext)
    vars(stopping).update(SufficientProgressCriterion=lambda **_: None)
    return {"benchopt": benchopt, "benchopt.stopping_criterion": stopping}


def task(folder: Path) -> dict[str, Any]:
    """Return the functions of the task, from the repository's own module."""
    split = data.mnist(folder)
    images = {"training": split.train, "test": split.test}
    arrays: dict[str, Any] = {}
    for name, part in images.items():
        arrays[f"{name}_images"] = np.rint(255 * part.x).astype(np.uint8).reshape(len(part.x), -1)
        arrays[f"{name}_labels"] = part.y.astype(np.uint8)
    dataset = importlib.import_module("datasets.mnist").Dataset()
    dataset.ratio, dataset.random_state, dataset.reg = 0.5, 32, 0.2
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        try:
            os.chdir(directory)  # where the module looks for this file
            Path("mnist.pkl").write_bytes(pickle.dumps(arrays))
            return dataset.get_data()
        finally:
            os.chdir(before)


def objective(of: dict[str, Any]) -> dict[str, Any]:
    """Return the functions, sizes and initial values, as the repository's objective does."""
    (inner, inner_samples, inner_size, _), (outer, outer_samples, outer_size, _) = of["pb_inner"], of["pb_outer"]
    return {
        "f_inner": inner,
        "f_outer": outer,
        "n_inner_samples": inner_samples,
        "n_outer_samples": outer_samples,
        "inner_var0": jnp.zeros(inner_size),
        "outer_var0": -2 * jnp.ones(outer_size),
    }


def published(name: str, of: dict[str, Any], seed: int) -> Any:
    """Return a solver of the repository, compiled."""
    solver = importlib.import_module(f"solvers.{name.lower()}").Solver()
    for parameter, values in solver.parameters.items():
        setattr(solver, parameter, values[0])
    for parameter, value in PUBLISHED[name].items():
        setattr(solver, parameter, value)
    solver.batch_size, solver.eval_freq, solver.random_state = BATCH, BLOCK, seed
    solver.set_objective(**objective(of))
    return solver


class Ours(Base):
    """A loop of a training step and a hypergradient, with the same interface."""

    def __init__(self, name: str, of: dict[str, Any], seed: int) -> None:
        start = objective(of)
        inner, outer = (partial(start[f], batch_size=BATCH) for f in ("f_inner", "f_outer"))
        problem = bl.Problem(inner, outer)
        sampler = importlib.import_module("benchmark_utils.minibatch_sampler").init_sampler
        keys = jax.random.split(jax.random.PRNGKey(seed), 2)
        numbers = (start["n_inner_samples"], start["n_outer_samples"])
        (draw, rows), (draw_outer, others) = (sampler(n, BATCH, key) for n, key in zip(numbers, keys, strict=True))
        optimizer, outer_optimizer = optax.adam(RATE), optax.adam(OUTER_RATE)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            w, scores, moments, outer_moments, adjoint, rows, others = carry
            first, *_, rows = draw(dict(rows))
            first_outer, *_, others = draw_outer(dict(others))
            updates, moments = optimizer.update(jax.grad(inner)(w, scores, first), moments)
            w = optax.apply_updates(w, updates)
            hg = bl.hypergradient(
                problem,
                w,
                scores,
                inner_args=(first,),
                outer_args=(first_outer,),
                solver=OURS[name],
                adjoint0=adjoint,
                on_failure="ignore",
            )
            updates, outer_moments = outer_optimizer.update(hg.grad, outer_moments)
            return (w, optax.apply_updates(scores, updates), moments, outer_moments, hg.adjoint, rows, others), None

        self.block = jax.jit(lambda carry: jax.lax.scan(step, carry, length=BLOCK)[0])
        w, scores = start["inner_var0"], start["outer_var0"]
        self.start = (w, scores, optimizer.init(w), outer_optimizer.init(scores), jnp.zeros_like(w), rows, others)
        self.run_once(1)

    def run(self, callback: Callable[[], bool]) -> None:
        """Run blocks of steps until a function says no."""
        carry = self.start
        self.inner_var, self.outer_var = carry[:2]
        while callback():
            carry = self.block(carry)
            self.inner_var, self.outer_var = carry[:2]


def timed(solver: Any, of: dict[str, Any], seconds: float) -> list[Point]:
    """Return the test errors along a run."""
    spent = 0.0
    began: float | None = None
    points: list[Point] = []

    def callback() -> bool:
        nonlocal spent, began
        if began is not None:  # not in the first call
            jax.block_until_ready((solver.inner_var, solver.outer_var))
            spent += time.process_time() - began
            points.append((spent, of["metrics"](solver.inner_var, solver.outer_var)["test_accuracy"]))  # an error
        began = time.process_time()
        return spent < seconds

    solver.run(callback)
    return points


def main(argv: list[str] | None = None) -> None:
    """Print a line for each solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="a checkout of benchmark_bilevel")
    parser.add_argument("--data", type=Path, required=True, help="the folder that has mnist/, with all training images")
    parser.add_argument("--solvers", nargs="+", default=[*PUBLISHED, *OURS], choices=[*PUBLISHED, *OURS])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    sys.modules.update(stand_ins())
    sys.path.insert(0, str(options.repository))
    of = task(options.data)
    times = [options.seconds * part for part in (0.1, 0.25, 0.5, 1)]
    print(f"{'test error (%) after':<22}" + "".join(f"{seconds:>11.1f} s" for seconds in times))
    for name in options.solvers:
        errors, steps = [], []
        for seed in range(1, options.seeds + 1):
            solver = (published if name in PUBLISHED else Ours)(name, of, seed)
            points = timed(solver, of, options.seconds)
            reached = [[error for spent, error in points if spent <= limit] for limit in times]
            errors.append([100 * found[-1] if found else np.nan for found in reached])
            steps.append(BLOCK * len(points))
        means, spread = np.mean(errors, 0), np.std(errors, 0) / np.sqrt(max(options.seeds - 1, 1))
        cells = "".join(f"{f'{mean:.2f} ± {error:.2f}':>13}" for mean, error in zip(means, spread, strict=True))
        print(f"{name:<22}{cells}   {np.median(steps):.0f} steps", flush=True)


if __name__ == "__main__":
    main()
