"""Count the work of `bl.minimize` and of HOAG until F is close to its minimum: fits, and products of linear solves.

HOAG (Pedregosa, ICML 2016) takes gradient steps whose length follows a test of sufficient decrease. Its fits and linear
solves have tolerances that decrease with a finite sum. `bl.minimize` uses L-BFGS-B with such tolerances of the linear
solves. Both run here on the same problems, with the same fits.

    python -m benchmarks.outer_search
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import bilevel as bl

CLOSE = (1e-2, 1e-3, 1e-4)  # of the decrease that the best search reaches


class Case(NamedTuple):
    """A problem with its data and start."""

    name: str
    problem: Any
    train: tuple[Any, ...]
    val: tuple[Any, ...]
    start: np.ndarray
    low: float = -12.0
    high: float = 4.0


class Trace(NamedTuple):
    """F after each evaluation, with the products of the linear solves up to there."""

    values: list[float]
    products: list[int]


def cases(seed: int) -> list[Case]:
    """Return ridge and logistic regression, with one penalty and with a penalty per feature."""
    rng = np.random.default_rng(seed)
    n, d = 400, 60
    X, V = rng.standard_normal((2, n, d)) * np.logspace(0, -1, d)
    w = rng.standard_normal(d) * (rng.random(d) < 0.3)
    y, u = X @ w + rng.standard_normal(n), V @ w + rng.standard_normal(n)
    labels, held_out = (y > 0).astype(float), (u > 0).astype(float)
    ridge, logistic = bl.problems.ridge(), bl.problems.logistic_regression()
    return [
        Case("ridge, shared", ridge, (X, y), (V, u), np.zeros(())),
        Case("ridge, per feature", ridge, (X, y), (V, u), np.zeros(d)),
        Case("logistic, shared", logistic, (X, labels), (V, held_out), np.zeros(())),
        Case("logistic, per feature", logistic, (X, labels), (V, held_out), np.zeros(d)),
    ]


def by_minimize(case: Case) -> Trace:
    """Search with `bl.minimize`."""
    fit = bl.newton_fit(case.problem, inner_args=case.train)
    found = bl.minimize(
        case.problem,
        case.start,
        fit=fit,
        inner_args=case.train,
        outer_args=case.val,
        bounds=(case.low, case.high),
        maxiter=200,
        on_failure="ignore",
    )
    return Trace([float(e.value) for e in found.history], np.cumsum([e.steps for e in found.history]).tolist())


def by_hoag(case: Case, maxiter: int = 200, decrease: float = 0.9) -> Trace:
    """Search with the steps of HOAG: algorithm 1 of the paper with the adaptive step size of its section 5."""
    fit = bl.newton_fit(case.problem, inner_args=case.train)
    clip: Callable[[Any], Any] = lambda h: np.clip(h, case.low, case.high)  # noqa: E731
    h, w, adjoint, tolerance = case.start, None, None, 1e-2
    values, products, lipschitz, before = [], [], None, None
    for _ in range(maxiter):
        w = fit(h, w)
        hg = bl.hypergradient(
            case.problem,
            w,
            h,
            inner_args=case.train,
            outer_args=case.val,
            solver=bl.CG(rtol=max(tolerance, 1e-5)),
            adjoint0=adjoint,
            on_failure="ignore",
        )
        values.append(float(hg.value))
        products.append(int(hg.info.steps) + (products[-1] if products else 0))
        adjoint, grad = hg.adjoint, np.asarray(hg.grad)
        lipschitz = lipschitz or float(np.linalg.norm(grad))
        if before is not None:
            old_h, old_value, old_grad = before
            moved = np.linalg.norm(h - old_h)
            if values[-1] <= old_value + tolerance * old_value - 0.5 * lipschitz * moved**2:
                lipschitz *= 0.95
            elif values[-1] > 1.2 * old_value:  # go back
                lipschitz *= 2
                h, grad = old_h, old_grad
        before = h, values[-1], grad
        h = clip(h - grad / lipschitz)
        tolerance *= decrease
    return Trace(values, products)


def work(trace: Trace, target: float) -> tuple[int, int] | None:
    """Return the evaluations and products until F is at most the target. None: never."""
    for i, (value, products) in enumerate(zip(trace.values, trace.products, strict=True)):
        if value <= target:
            return i + 1, products
    return None


def main(seeds: int = 3) -> None:
    """Print the evaluations (fits) and products of both searches, medians over the seeds."""
    print(f"{'':<24}{'within':>8}{'minimize: fits, products':>28}{'HOAG: fits, products':>26}")
    for k in range(len(cases(0))):
        runs = [(by_minimize(case := cases(seed)[k]), by_hoag(case)) for seed in range(seeds)]
        for close in CLOSE:
            rows: tuple[list[Any], list[Any]] = ([], [])
            for pair in runs:
                best = min(min(trace.values) for trace in pair)
                target = best + close * (pair[0].values[0] - best)
                for row, trace in zip(rows, pair, strict=True):
                    row.append(work(trace, target))
            texts = []
            for row in rows:
                known = [each for each in row if each is not None]
                median = [f"{np.median([each[i] for each in known]):.0f}" for i in (0, 1)] if known else ["-", "-"]
                missed = f" ({seeds - len(known)} never)" if len(known) < seeds else ""
                texts.append(", ".join(median) + missed)
            print(f"{cases(0)[k].name:<24}{close:>8.0e}{texts[0]:>28}{texts[1]:>26}")


if __name__ == "__main__":
    main()
