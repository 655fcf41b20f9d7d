"""Check hypergradients on the problems of BOLIB, a library of bilevel problems from the literature.

BOLIB (Zhou, Zemkoho & Tin, "BOLIB: Bilevel Optimization LIBrary of test problems", 2020) has 165 continuous problems

    min over x   F(x, y)   subject to G(x, y) >= 0,   where y minimizes f(x, y) subject to g(x, y) >= 0.

Its translation to Julia, https://github.com/cinaral/BOLIB.jl, has one file for each problem. This script reads the
formulas from these files, so nothing of the library is part of this repository:

    git clone https://github.com/cinaral/BOLIB.jl
    python -m benchmarks.bilevel_libraries BOLIB.jl/src/BOLIBver2_converted

At each of several x near the start of the library, SciPy solves the lower level from several starts, by finite
differences. A point qualifies if the best solution is a regular KKT point. There, the script compares the hypergradient
with central differences of problems that are solved again. With ``--minimize``, it also minimizes F by `bl.minimize`,
if G does not depend on y, and compares the result with the best known value of the library.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch

import bilevel as bl
from bilevel.search.kkt import System

POINTS = 5  # upper-level points for each problem, until one qualifies
STARTS = 8  # of the lower level
STEP = 1e-5  # of central differences
ACCURATE = 1e-6  # relative error of a right hypergradient
FEASIBLE = 1e-6
REACHED = 1e-3  # relative distance to the best known value
SEARCH_LIMIT = 120  # seconds of a search by `bl.minimize`


class BolibProblem(NamedTuple):
    """A problem of BOLIB: functions of (x, y, lib), where lib is NumPy or torch.

    Attributes:
        name: the name in the library.
        functions: the bodies of F, G, f and g.
        start: x and y.
        best: the best known value of F. nan: unknown.
    """

    name: str
    functions: dict[str, Callable[[Any, Any, Any], list[Any]]]
    start: tuple[np.ndarray, np.ndarray]
    best: float


def read(path: Path) -> BolibProblem:
    """Read a problem from its file in Julia."""
    text = path.read_text()
    n = int(re.search(r"n1::Int64 = (\d+)", text)[1])  # pyright: ignore[reportOptionalSubscript]
    start = np.array(_numbers(text, "xy_init"))
    best = _numbers(text, "Ff_optimal")
    known = len(best) == 3 and best[2] != 0
    functions = {name: _function(name, text) for name in ("F", "G", "f", "g")}
    return BolibProblem(path.stem, functions, (start[:n], start[n:]), best[0] if known else math.nan)


def _numbers(text: str, name: str) -> list[float]:
    found = re.search(rf"{name} = Float64\[(.*?)\]", text, re.DOTALL)
    return [float(x) for x in re.split(r"[;,\s]+", found[1]) if x] if found else []


def _function(name: str, text: str) -> Callable[[Any, Any, Any], list[Any]]:
    """Return the function as Python code. Its body is one expression, or an array of expressions in brackets."""
    body = re.search(rf"function {name}\(xy\)\n.*?\n.*?\n(.*?)\n\tend", text, re.DOTALL)
    assert body is not None
    parts = body[1].strip().removeprefix("[").removesuffix("]") if name in "Gg" else body[1].strip()
    lines = [part.strip() for part in parts.split(";") if part.strip()]
    python = [re.sub(r"\b([xy])\[(\d+)\]", lambda m: f"{m[1]}[{int(m[2]) - 1}]", line) for line in lines]
    python = [re.sub(r"\b(exp|cos|abs|sqrt)\(", r"lib.\1(", line.replace("^", "**")) for line in python]
    python = [re.sub(r"\bpi\b", str(math.pi), line) for line in python]
    return eval(f"lambda x, y, lib: [{', '.join(python)}]")


def lower_level(problem: BolibProblem) -> bl.Constrained:
    """Return the lower level for torch. A problem without constraints gets one that never holds."""
    functions = problem.functions

    def objective(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _sum(functions["f"](x, y, torch), y)

    def inequality(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = functions["g"](x, y, torch) or [1.0]
        return -torch.stack([torch.as_tensor(row, dtype=y.dtype) + 0 * y[0] for row in rows])

    def outer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _sum(functions["F"](x, y, torch), y) + 0 * x.sum()

    return bl.Constrained(objective, outer, inequality=inequality)


def _sum(parts: list[Any], y: torch.Tensor) -> torch.Tensor:
    return parts[0] + 0 * y.sum()


def solve(problem: BolibProblem, x: np.ndarray, rng: np.random.Generator) -> list[tuple[float, np.ndarray]]:
    """Return the values and solutions of the lower level from several starts, the best first."""
    f, g = problem.functions["f"], problem.functions["g"]
    constraints = {"type": "ineq", "fun": lambda y: np.array(g(x, y, np), dtype=float)}
    found = []
    for i in range(STARTS):
        y = problem.start[1] + (rng.standard_normal(len(problem.start[1])) * 3 if i else 0)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = scipy.optimize.minimize(
                lambda y: float(f(x, y, np)[0]),
                y,
                method="SLSQP",
                constraints=constraints if g(x, y, np) else (),
                options={"ftol": 1e-14, "maxiter": 300},
            )
            slack = constraints["fun"](result.x).min(initial=0.0)
        if np.isfinite(result.fun) and slack > -FEASIBLE and np.abs(result.x).max() < 1e6:
            found.append((float(result.fun), result.x))
    return sorted(found, key=lambda pair: pair[0])


class Point(NamedTuple):
    """A qualified point: its hyperparameters x, and params of the lower level."""

    x: torch.Tensor
    params: dict[str, torch.Tensor]


def qualify(problem: BolibProblem, x: np.ndarray, rng: np.random.Generator) -> Point | str:
    """Return a regular solution of the lower level, or the reason why there is none."""
    found = solve(problem, x, rng)
    if not found:
        return "no solution found"
    value, y = found[0]
    scale = max(1.0, abs(value))
    best = [other for v, other in found if v - value <= 1e-7 * scale]
    lower, hparams = lower_level(problem), torch.tensor(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bl.InnerProblemWarning)
        try:
            params = bl.with_multipliers(lower, torch.tensor(y), hparams, tol=1e-5)
        except ValueError as error:
            return "no KKT point found" if "KKT" in str(error) else "no solution found"
    if caught:
        return "dependent constraints"
    multipliers, slack = params["inequality"], -lower.inequality(params["w"], hparams)  # pyright: ignore
    if bool(((multipliers < 1e-6) & (slack < 1e-6)).any()):
        return "multiplier of zero"
    if max(np.abs(other - y).max() for other in best) > 1e-3 * max(1.0, np.abs(y).max()):
        return "several solutions"
    system = System.of(lower, params["w"], hparams, (), None)
    residual, matrix = system.at(system.flat(params))
    left = np.linalg.lstsq(matrix, residual)[0]  # the next step of Newton's method, which is long at a minimum of y⁴
    if not system.is_minimum(system.flat(params)) or np.abs(left).max() > FEASIBLE:
        return "no strict minimum"
    return Point(hparams, params)


def error(problem: BolibProblem, point: Point) -> float:
    """Return the error of the hypergradient, relative to differences of solved problems (or to one)."""
    lower: Any = lower_level(problem)
    fit = bl.constrained_fit(lower)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.SolverWarning)
        warnings.simplefilter("ignore", bl.DependenceWarning)
        grad = bl.hypergradient(lower, point.params, point.x, solver="exact").grad.numpy()
        slopes = []
        for unit in torch.eye(len(point.x), dtype=point.x.dtype):
            ends = [point.x + sign * STEP * unit for sign in (1, -1)]
            high, low = (float(lower.outer(fit(x, point.params), x)) for x in ends)
            slopes.append((high - low) / (2 * STEP))
    return float(np.abs(grad - slopes).max() / max(1.0, np.abs(slopes).max()))


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after this time."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def minimized(problem: BolibProblem, point: Point) -> float | str:
    """Return the value of F that `bl.minimize` finds from a point, or the reason why there is none.

    F is computed again at the result, with the best solution of the lower level from several starts.
    """
    G, lower = problem.functions["G"], lower_level(problem)
    x, y = problem.start

    def upper(x: np.ndarray) -> np.ndarray:
        return np.array(G(x, y, np), dtype=float)

    if not np.array_equal(upper(x), np.array(G(x, y + 1.234, np), dtype=float)):
        return "G depends on y"
    constraints = [{"type": "ineq", "fun": upper}] if len(upper(x)) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = bl.minimize(
                lower,
                point.x,
                fit=bl.constrained_fit(lower, maxiter=50),
                params0=point.params,
                solver="exact",
                method="SLSQP",
                constraints=constraints,
                maxiter=30,
                on_failure="ignore",
                progress=False,
            )
        except (ValueError, bl.SolverError) as error:
            return f"{type(error).__name__} of a solve"
    if not upper(found.x.numpy()).min(initial=0.0) > -FEASIBLE:
        return "x is not feasible"
    solved = solve(problem, found.x.numpy(), np.random.default_rng(2))
    if not solved:
        return "no solution found"
    return float(problem.functions["F"](found.x.numpy(), solved[0][1], np)[0])


def searched(problem: BolibProblem, point: Point) -> dict[str, Any]:
    """Return the result of `minimized` and its seconds."""
    start = time.perf_counter()
    try:
        with limited(SEARCH_LIMIT):
            found = minimized(problem, point)
    except TimeoutError:
        found = "out of time"
    return {"found": found, "seconds": round(time.perf_counter() - start, 1)}


def points(problem: BolibProblem) -> Iterator[np.ndarray]:
    """Yield upper-level points: the start of the library, and random points near it."""
    rng = np.random.default_rng(0)
    x = problem.start[0]
    yield x
    for _ in range(POINTS - 1):
        yield x + rng.standard_normal(len(x))


def check(problem: BolibProblem, search: bool) -> dict[str, Any]:
    """Return the row of a problem: why it does not qualify, or the error and, with ``search``, the minimum."""
    rng, reasons = np.random.default_rng(1), Counter[str]()
    for x in points(problem):
        point = qualify(problem, x, rng)
        if isinstance(point, str):
            reasons[point] += 1
            continue
        try:
            off = error(problem, point)
        except (bl.SolverWarning, bl.SolverError):
            reasons["solution lost in a difference"] += 1
            continue
        active = int((point.params["inequality"] > 0).sum())
        row = {"name": problem.name, "active": active, "error": off}
        return row | searched(problem, point) if search else row
    return {"name": problem.name, "reason": reasons.most_common(1)[0][0]}


def main() -> None:
    """Print a line for each problem, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the files of BOLIB.jl, at any depth")
    parser.add_argument("--minimize", action="store_true", help="also run bl.minimize")
    parser.add_argument("--only", default="", help="a part of the names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = (path for path in args.folder.rglob("*.jl") if args.only in path.stem)
    paths = sorted(path for path in files if "xy_init" in path.read_text())
    rows = []
    for path in paths:
        problem = read(path)
        row = check(problem, args.minimize)
        rows.append((problem, row))
        print(*(f"{key}={value}" for key, value in row.items()), f"best={problem.best}", flush=True)
    summary(rows)


def summary(rows: list[tuple[BolibProblem, dict[str, Any]]]) -> None:
    """Print the counts."""
    qualified = [(problem, row) for problem, row in rows if "error" in row]
    right = [row for _, row in qualified if row["error"] <= ACCURATE]
    print(f"\n{len(rows)} problems, {len(qualified)} qualify, {len(right)} hypergradients are right to {ACCURATE:g}.")
    print(f"Active constraints: {sorted(Counter(row['active'] for _, row in qualified).items())}")
    for reason, count in Counter(row["reason"] for _, row in rows if "reason" in row).most_common():
        print(f"{count:4d} {reason}")
    results = [(p, row["found"]) for p, row in qualified if "found" in row]
    for reason, count in Counter(found for _, found in results if isinstance(found, str)).most_common():
        print(f"{count:4d} without a search, or without its result: {reason}")
    values = [(p, found) for p, found in results if not isinstance(found, str) and np.isfinite(p.best)]
    near = [found for p, found in values if found <= p.best + REACHED * max(1.0, abs(p.best))]
    print(f"bl.minimize: {len(values)} searches with a known best value, {len(near)} reach it.")


if __name__ == "__main__":
    main()
