"""`implicit_minimizer` with constraints under transformations: against solutions in closed form."""

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

TIGHT = bl.MINRES(rtol=1e-13)
H = jnp.array([2.0, -1.0, 2.0], jnp.float64)
COSTS = np.array([1.0, 3.0, -2.0])


def distance(w, h, radius=2.0):
    return 0.5 * jnp.sum((w - h) ** 2)


def outside(w, h, radius=2.0):
    return (w @ w - radius**2)[None]


def nearest(h, radius):
    """The nearest point of a ball."""
    return h * radius / jnp.linalg.norm(h)


@bilevel_jax.implicit_minimizer(distance, TIGHT, inequality=outside)
def in_ball(h, *, radius=2.0):
    return {"w": nearest(h, radius), "inequality": ((jnp.linalg.norm(h) / radius - 1) / 2)[None]}


def test_all_modes_and_orders_with_a_curved_inequality():
    found, expected = (lambda h: COSTS @ in_ball(h)["w"]), (lambda h: COSTS @ nearest(h, 2.0))
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        assert relative_error(jax.jit(derivative(found))(H), derivative(expected)(H)) <= 1e-9
    assert relative_error(jax.vmap(jax.grad(found))(jnp.stack([H, 2 * H]))[1], jax.grad(expected)(2 * H)) <= 1e-9
    multiplier = jax.grad(lambda h: in_ball(h)["inequality"].sum())(H)
    assert relative_error(multiplier, H / np.linalg.norm(H) / 4) <= 1e-9


def test_a_keyword_argument_reaches_the_constraint():
    found = jax.grad(lambda radius: COSTS @ in_ball(H, radius=radius)["w"])(jnp.asarray(1.5))
    assert relative_error(found, COSTS @ H / np.linalg.norm(H)) <= 1e-9


def test_an_equality_and_an_inactive_inequality():
    def total(w, h):
        return (w.sum() - 1.0)[None]

    @bilevel_jax.implicit_minimizer(distance, TIGHT, equality=total, inequality=lambda w, h: w - 9.0)
    def solve(h):
        shift = (h.sum() - 1.0) / 3
        return {"w": h - shift, "equality": shift[None], "inequality": jnp.zeros(3)}

    assert relative_error(jax.grad(lambda h: COSTS @ solve(h)["w"])(H), COSTS - COSTS.mean()) <= 1e-9


def test_errors():
    with pytest.raises(ValueError, match="prox and constraints exclude each other"):
        bilevel_jax.implicit_minimizer(distance, prox=bl.prox.l1(), inequality=outside)
    with pytest.raises(ValueError, match="step_size is of the proximal step, so it needs prox"):
        bilevel_jax.implicit_minimizer(distance, step_size=0.1)
    with pytest.raises(TypeError, match=r"Constrained.inequality: expected a function"):
        bilevel_jax.implicit_minimizer(distance, inequality=1.0)
    solve = bilevel_jax.implicit_minimizer(distance, inequality=outside)
    with pytest.raises(ValueError, match='params: expected a dict with "w" and the multipliers'):
        solve(lambda h: h)(H)
    with pytest.raises(TypeError, match=r"CG relies on a positive definite .* Use solver=\"minres\""):
        jax.grad(lambda h: solve(in_ball.__wrapped__)(h)["w"].sum())(H)
