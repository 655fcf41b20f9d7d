"""The hypergradients of many queries under JAX's transformations."""

import pytest

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy


def inner(w, h, x):
    return (h * (x @ w - 1.0) ** 2).sum() + 0.5 * w @ w


PROBLEM = bl.Problem(inner, lambda w, h, t: (t @ w) ** 2)
X, T = jnp.linspace(-1, 1, 15).reshape(5, 3), jnp.eye(3)[:2] + 0.5
W, H = jnp.array([0.3, -0.2, 0.5]), jnp.ones(5)


CG = bl.CG(rtol=1e-12)


def grads(w, h, t, solver=CG):
    return bl.hypergradients(PROBLEM, w, h, inner_args=(X,), outer_args=(t,), solver=solver)


def test_jit_and_vmap_give_the_same_with_traced_info():
    eager = grads(W, H, T)
    jitted = jax.jit(grads)(W, H, T)
    assert jnp.allclose(eager.grad, jitted.grad, rtol=1e-12)
    assert isinstance(jitted.info.steps, jax.Array)
    stacked = jax.vmap(grads, in_axes=(None, None, 0))(W, H, jnp.stack([T, 2 * T]))
    assert jnp.allclose(stacked.grad[0], eager.grad, rtol=1e-10)
    assert stacked.info.status.shape == (2, 2)


def test_the_inner_problem_is_traced_once_for_all_calls_and_queries():
    calls = []

    def counted(w, h, x):
        calls.append(1)
        return inner(w, h, x)

    problem = bl.Problem(counted, PROBLEM.outer)
    bl.hypergradients(problem, W, H, inner_args=(X,), outer_args=(T,))
    once = len(calls)
    bl.hypergradients(problem, W, H, inner_args=(X,), outer_args=(2 * T,))
    assert len(calls) == once
    bl.hypergradients(problem, W, H, inner_args=(X,), outer_args=(jnp.concatenate([T] * 4),))
    assert len(calls) == 2 * once  # compiled again for the new shape, but not traced once per query


def test_batches_of_different_shapes_are_named():
    problem = bl.Problem(inner, lambda w, h, t: ((t @ w) ** 2).sum())
    with pytest.raises(ValueError, match=r"shape \(2, 3\) in batch 1, but .*shape \(1, 3\) in batch 0"):
        bl.hypergradients(problem, W, H, inner_args=(X,), outer_args=[(T[:1],), (T,)])


def test_a_derivative_of_the_hypergradients_passes_through():
    """By forward mode, with traced info: dF_q/dλ along a change of λ, against a difference."""
    u, series = jnp.arange(5.0) / 5, bl.Neumann(terms=300)
    tangent = jax.jvp(lambda h: grads(W, h, T, series).grad, (H,), (u,))[1]
    step = 1e-6
    difference = (grads(W, H + step * u, T, series).grad - grads(W, H - step * u, T, series).grad) / (2 * step)
    assert jnp.allclose(tangent, difference, rtol=1e-6, atol=1e-8)
