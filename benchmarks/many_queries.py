"""Time and memory of the influence scores of many queries by one call, against one query and a loop.

An MLP (64-32-10, tanh) on 800 digits, with a weight per training example. The queries are the losses of single test
digits. Times are minima of CPU time, interleaved. The last column has a prepared Nyström preconditioner. Run it on one
thread, as ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/many_queries.py [torch|jax] [queries]``.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import bilevel as bl

TRAIN, SIZES, PENALTY = 800, (64, 32, 10), 5e-4
CG = {"name": "cg", "damping": 0.01}
SKETCHED = CG | {"preconditioner": bl.NystromPreconditioner(rank=100)}
REPEATS = 15


def main(framework: str = "torch", queries: str = "20") -> None:
    """Print a row of ratios."""
    count = int(queries)
    problem, params, weights, data, (x, y), wait = digits(framework)
    scalar = bl.Problem(problem.inner, lambda *args: problem.outer(*args).mean())  # pyright: ignore

    def single(q: int = 0) -> Any:
        outer_args = x[q : q + 1], y[q : q + 1]
        return wait(bl.hypergradient(scalar, params, weights, inner_args=data, outer_args=outer_args, solver=CG).grad)

    def together(solver: Any = CG) -> Any:
        outer_args = x[:count], y[:count]
        return wait(bl.influence(problem, params, weights, inner_args=data, outer_args=outer_args, solver=solver))

    def loop() -> Any:
        return [single(q) for q in range(count)]

    sketched = bl.prepare(SKETCHED, problem, params, weights, inner_args=data)
    one = np.stack([np.asarray(row) for row in loop()])
    before = memory()
    many = np.asarray(together())
    after = memory()
    error = np.abs(many - one).max() / np.abs(one).max()
    first, *others = best(single, together, loop, lambda: together(sketched))
    ratios = "one call {:.1f}, a loop {:.1f}, one call with a preconditioner {:.1f}"
    print(f"{framework}: one query {1e3 * first:.1f} ms. {count} queries, in multiples:", end=" ")
    print(ratios.format(*[time / first for time in others]), end=". ")
    print(f"Difference {error:.0e}. Memory {after - before:.0f} MiB.")


def digits(framework: str, dtype: Any = np.float32) -> tuple[bl.Problem, Any, Any, Any, Any, Callable[..., Any]]:
    """Return the problem, trained params, weights, the training data, the test data, and a function that waits."""
    array, losses, wait = {"torch": in_torch, "jax": in_jax}[framework]()

    def inner(w: Any, weights: Any, x: Any, y: Any) -> Any:
        return (weights * losses(w, x, y)).mean() + PENALTY * sum((a**2).sum() for a in w.values())

    def outer(w: Any, weights: Any, x: Any, y: Any) -> Any:
        return losses(w, x, y)

    images, labels = load_digits(return_X_y=True)
    x, y = array((images / 16).astype(dtype)), array(np.asarray(labels))
    problem, data, weights = bl.Problem(inner, outer), (x[:TRAIN], y[:TRAIN]), array(np.ones(TRAIN, dtype))
    rng, params = np.random.default_rng(0), {}
    for i, (n, m) in enumerate(pairwise(SIZES)):
        params |= {f"w{i}": array(rng.normal(0, n**-0.5, (n, m)).astype(dtype)), f"b{i}": array(np.zeros(m, dtype))}
    fit = bl.scipy_fit(problem, inner_args=data, options={"maxiter": 2000})
    return problem, fit(weights, params), weights, data, (x[TRAIN:], y[TRAIN:]), wait


def in_torch() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return functions for PyTorch: array, losses of examples, wait."""
    import torch

    def losses(w: Any, x: Any, y: Any) -> Any:
        logits = torch.tanh(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    return torch.as_tensor, losses, lambda result: result


def in_jax() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return functions for JAX: array, losses of examples, wait."""
    import jax
    import jax.numpy as jnp

    def losses(w: Any, x: Any, y: Any) -> Any:
        logits = jnp.tanh(x @ w["w0"] + w["b0"]) @ w["w1"] + w["b1"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]

    return jnp.asarray, losses, jax.block_until_ready


def best(*functions: Callable[[], object]) -> list[float]:
    """Return the least time of each function, in seconds."""
    times = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, of in zip(functions, times, strict=True):
            start = process_time()
            function()
            of.append(process_time() - start)
    return [min(of) for of in times]


def memory() -> float:
    """Return the largest resident memory so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
