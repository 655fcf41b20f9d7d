"""Hypergradients in JAX: loops as a careful user writes them, and ours. Each is a function that is yet to be jitted."""

from collections.abc import Callable
from functools import partial
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import bilevel as bl
from benchmarks.speed.jax_workloads import Workload

Function = Callable[..., Any]  # of (params, log_decays, train, val), to dF/dλ
UNROLLED_AT_MOST = 10  # products, in a hand-written loop without a loop; beyond, compiling takes too long


def functions(w: Workload, method: str, count: int) -> dict[str, Function]:
    """Return what computes the hypergradient of a workload, by column."""
    if method == "unrolled":
        return {
            "hand-written": partial(unrolled, w, count, lambda step: step),
            "hand-written, remat": partial(unrolled, w, count, jax.checkpoint),
            "ours": partial(ours, w, bl.Unrolled(count, w.step_size)),
            "ours, checkpoints": partial(ours, w, bl.Unrolled(count, w.step_size, checkpoint=True)),
        }
    solve = partial(cg, count) if method == "cg" else partial(neumann, count, w.step_size)
    solver = (
        bl.CG(maxiter=count, rtol=None, damping=0.0)
        if method == "cg"
        else bl.Neumann(terms=count, step_size=w.step_size)
    )
    made: dict[str, Function] = {"hand-written": partial(hand_written, w, partial(solve, lax.fori_loop))}
    if count <= UNROLLED_AT_MOST:
        made["hand-written, no loop"] = partial(hand_written, w, partial(solve, python_loop))
    return made | {"ours": partial(ours, w, solver)}


def columns(made: dict[str, Function], w: Workload, eager: bool = True) -> dict[str, Callable[[], Any]]:
    """Return calls of the jitted functions, of a training step, and of ours not jitted by the user."""
    calls = {"plain step": ready(jax.jit(partial(plain_step, w)), w.params, w.log_decays, w.train)}
    calls |= {name: ready(jax.jit(function), *w.point) for name, function in made.items()}
    if eager:
        calls["ours, eager"] = ready(made["ours"], *w.point)
    return calls


def ready(function: Function, *point: Any) -> Callable[[], list[jax.Array]]:
    """Return a call that waits for the result."""
    return lambda: jax.block_until_ready(jax.tree.leaves(function(*point)))


def plain_step(w: Workload, params: Any, log_decays: Any, train: Any) -> Any:
    """Take a step of Adam from its start."""
    gradient = jax.grad(w.inner)(params, log_decays, train)

    def adam(p: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, square = 0.1 * g, 0.001 * g**2
        return p - 1e-3 * (mean / 0.1) / (jnp.sqrt(square / 0.001) + 1e-8), mean, square

    return jax.tree.map(adam, params, gradient)


def hand_written(w: Workload, solve: Function, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Linearize ∇L once, solve, and pull back to λ."""
    rhs = jax.grad(w.outer)(params, log_decays, val)
    _, product = jax.linearize(lambda p: jax.grad(w.inner)(p, log_decays, train), params)
    v = solve(product, rhs)
    _, pull = jax.vjp(lambda h: jax.grad(w.inner)(params, h, train), log_decays)
    return jax.tree.map(jnp.negative, pull(v)[0])


def python_loop(start: int, stop: int, body: Function, carry: Any) -> Any:
    """Do as lax.fori_loop, without a loop in what is compiled."""
    for i in range(start, stop):
        carry = body(i, carry)
    return carry


def neumann(count: int, step_size: float, loop: Function, product: Function, rhs: Any) -> Any:
    """Sum the series."""

    def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        v, total = carry
        v = jax.tree.map(lambda a, b: a - step_size * b, v, product(v))
        return v, jax.tree.map(add, total, v)

    _, total = loop(0, count, body, (rhs, rhs))
    return jax.tree.map(lambda t: step_size * t, total)


def dot(x: Any, y: Any) -> jax.Array:
    """Return the inner product."""
    return jax.tree.reduce(add, jax.tree.map(jnp.vdot, x, y))


def cg(count: int, loop: Function, product: Function, rhs: Any) -> Any:
    """Conjugate gradients by the textbook."""

    def body(_: Any, carry: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
        x, r, p, rr = carry
        Ap = product(p)
        alpha = rr / dot(p, Ap)
        x = jax.tree.map(lambda a, b: a + alpha * b, x, p)
        r = jax.tree.map(lambda a, b: a - alpha * b, r, Ap)
        new = dot(r, r)
        p = jax.tree.map(lambda a, b: a + new / rr * b, r, p)
        return x, r, p, new

    return loop(0, count, body, (jax.tree.map(jnp.zeros_like, rhs), rhs, rhs, dot(rhs, rhs)))[0]


def unrolled(w: Workload, count: int, kept: Function, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Differentiate through a scan over steps of gradient descent."""

    def end(h: Any) -> jax.Array:
        def step(p: Any, _: None) -> tuple[Any, None]:
            return jax.tree.map(lambda a, g: a - w.step_size * g, p, jax.grad(w.inner)(p, h, train)), None

        return w.outer(lax.scan(kept(step), params, None, count)[0], h, val)

    return jax.grad(end)(log_decays)


def ours(w: Workload, solver: Any, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Hand over the two functions."""
    return bl.hypergradient(
        bl.Problem(w.inner, w.outer), params, log_decays,
        inner_args=(train,), outer_args=(val,), solver=solver, on_failure="ignore",
    ).grad  # fmt: skip
