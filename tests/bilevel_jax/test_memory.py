"""The memory of a compiled hypergradient, counted in vectors and compared with a loop that is written by hand."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

import bilevel as bl  # noqa: E402

N, STEPS = 10_000, 5


def inner(w, h):
    return jnp.sum(0.5 * jnp.exp(h) * w**2 + jnp.cos(w))


def outer(w, h):
    return jnp.sum(jnp.sin(w))


def vectors(function):
    """Return the temporary memory of a compiled function of (w, λ), in vectors."""
    point = jnp.zeros(N), jnp.zeros(N)
    memory = jax.jit(function).lower(*point).compile().memory_analysis()
    return memory.temp_size_in_bytes / point[0].nbytes


def by_hand(w, h):
    b = jax.grad(outer)(w, h)
    _, product = jax.linearize(lambda w: jax.grad(inner)(w, h), w)

    def step(_, carry):
        x, r, p, rr = carry
        Ap = product(p)
        alpha = rr / jnp.vdot(p, Ap)
        r = r - alpha * Ap
        return x + alpha * p, r, r + jnp.vdot(r, r) / rr * p, jnp.vdot(r, r)

    v = lax.fori_loop(0, STEPS, step, (jnp.zeros_like(b), b, b, jnp.vdot(b, b)))[0]
    return -jax.vjp(lambda h: jax.grad(inner)(w, h), h)[1](v)[0]


@pytest.mark.parametrize(
    ("solver", "more"),
    [(bl.CG(maxiter=STEPS, rtol=None, damping=0.0), 0), (bl.CG(damping=0.0), 1), (bl.Neumann(STEPS, 0.1), -1)],
    ids=["cg, a budget", "cg", "neumann"],
)
def test_a_hypergradient_takes_few_vectors(solver, more):
    """CG also keeps the right-hand side, to check its residual, and with several cycles the start of a cycle."""

    def ours(w, h):
        return bl.hypergradient(bl.Problem(inner, outer), w, h, solver=solver, on_failure="ignore").grad

    assert vectors(ours) <= vectors(by_hand) + more + 0.1


def test_a_derivative_of_a_hypergradient_passes_through_its_last_product():
    """By w alone, and by λ alone: the solve without products is linear in the gradient of F."""

    def ours(w, h):
        return bl.hypergradient(bl.Problem(inner, outer), w, h, solver="identity", on_failure="ignore").grad.sum()

    point = jnp.linspace(-1, 1, 4), jnp.linspace(0, 1, 4)
    w, h = point
    by_w, by_h = jax.grad(ours, (0, 1))(*point)
    assert jnp.allclose(by_w, -jnp.exp(h) * (jnp.cos(w) - w * jnp.sin(w)), atol=1e-6)
    assert jnp.allclose(by_h, -jnp.exp(h) * w * jnp.cos(w), atol=1e-6)
