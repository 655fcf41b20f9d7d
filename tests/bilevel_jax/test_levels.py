"""Three levels: the inner loss of a level calls the solution of the level below."""

import numpy as np
import pytest
from frameworks import relative_error

jax = pytest.importorskip("jax")
bilevel_jax = pytest.importorskip("bilevel_jax")
jnp = jax.numpy

rng = np.random.default_rng(0)
A, B = map(jnp.asarray, rng.standard_normal((2, 6, 3)))
a, b = map(jnp.asarray, rng.standard_normal((2, 6)))


def lower(u, m):
    """Not quadratic, so that its third derivatives matter."""
    return 0.5 * ((A @ u - a) ** 2).sum() + 0.5 * (jnp.exp(m) * u**2).sum() + 0.05 * (u**4).sum()


@bilevel_jax.implicit_minimizer(lower)
def lower_solution(m):
    def newton(_, u):
        return u - jnp.linalg.solve(jax.hessian(lower)(u, m), jax.grad(lower)(u, m))

    return jax.lax.fori_loop(0, 10, newton, jnp.zeros(3))


def middle(m, h):
    u = lower_solution(m)
    return 0.5 * ((B @ u - b) ** 2).sum() + 0.5 * (jnp.exp(h) * m**2).sum() + 0.05 * (m**4).sum()


@bilevel_jax.implicit_minimizer(middle)
def middle_solution(h):
    return jax.lax.fori_loop(0, 400, lambda _, m: m - 0.1 * jax.grad(middle)(m, h), jnp.zeros(3))


def test_a_gradient_through_three_levels_is_the_difference_of_refits():
    def value(h):
        m = middle_solution(h)
        return (m**2).sum() + lower_solution(m).sum()

    h, step = jnp.array([-0.5, 0.0, 0.4]), 1e-4
    compiled = jax.jit(jax.value_and_grad(value))
    differences = [(compiled(h + step * e)[0] - compiled(h - step * e)[0]) / (2 * step) for e in jnp.eye(3)]
    assert relative_error(compiled(h)[1], differences) <= 1e-6
