"""Time calls of `implicit_minimizer` on a small ridge regression, where nothing but the call itself takes time.

OMP_NUM_THREADS=1 python -m benchmarks.implicit_call    # with JAXopt, if it is installed
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
import bilevel_jax

SIZE, ROUNDS, CALLS = 30, 25, 100


def main() -> None:
    """Print the least wall time and the median CPU time of a call, in microseconds."""
    calls = functions()
    h = jnp.zeros(SIZE)
    gradient = calls["implicit_minimizer"](h)
    for name, call in calls.items():
        if name != "the training alone":
            np.testing.assert_allclose(call(h), gradient, rtol=1e-4, atol=1e-5)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            for _ in range(CALLS):
                jax.block_until_ready(call(h))
            wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            times[name].append((wall / CALLS * 1e6, cpu / CALLS * 1e6))
    for name, pairs in times.items():
        walls, cpus = zip(*pairs, strict=True)
        print(f"| {name} | {min(walls):.0f} µs | {median(cpus):.0f} µs |")


def functions() -> dict[str, Callable[[jax.Array], Any]]:
    """Return compiled gradients by the logarithms of a penalty per weight."""
    rng = np.random.default_rng(0)
    X, y = jnp.asarray(rng.normal(size=(100, SIZE)), jnp.float32), jnp.asarray(rng.normal(size=100), jnp.float32)

    def inner(w: Any, h: Any, X: Any, y: Any) -> Any:
        return 0.5 * jnp.sum((X @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    def outer(w: Any) -> Any:
        return 0.5 * jnp.sum((X[:50] @ w - 2 * y[:50]) ** 2)

    def train(h: Any, X: Any, y: Any) -> Any:
        return jnp.linalg.solve(X.T @ X + jnp.diag(jnp.exp(h)), X.T @ y)

    def by_hand(h: Any) -> Any:
        w = train(h, X, y)
        _, product = jax.linearize(lambda w: jax.grad(inner)(w, h, X, y), w)
        v = jax.scipy.sparse.linalg.cg(product, jax.grad(outer)(w), tol=1e-5)[0]
        return -jax.vjp(lambda h: jax.grad(inner)(w, h, X, y), h)[1](v)[0]

    def ours(solver: Any) -> Any:
        solve = bilevel_jax.implicit_minimizer(inner, solver)(train)
        return jax.grad(lambda h: outer(solve(h, X, y)))

    made = {
        "implicit_minimizer": ours("cg"),
        "the same, without the automatic damping": ours(bl.CG(damping=0.0)),
        "by hand, CG of JAX": by_hand,
        "the training alone": lambda h: outer(train(h, X, y)),
    }
    if find_spec("jaxopt"):
        from jaxopt.implicit_diff import custom_root  # pyright: ignore[reportMissingImports]

        solve = custom_root(jax.grad(inner))(lambda _, h, X, y: train(h, X, y))
        made["JAXopt"] = jax.grad(lambda h: outer(solve(None, h, X, y)))
    return {name: jax.jit(function) for name, function in made.items()}


if __name__ == "__main__":
    main()
