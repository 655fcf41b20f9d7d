"""`implicit_minimizer` with a proximal operator or a projection under transformations: against re-solved problems."""

import numpy as np
import pytest
from frameworks import moved, relative_error
from proximal_cases import Case, Distance, Quadratic

import bilevel as bl
from bilevel import projections, prox

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

TIGHT = bl.CG(rtol=1e-13)


def solved(operator, case):
    """F as a function of the hyperparameters, and the hyperparameters."""
    h, (A, b), [target] = moved(bl.get_backend("jax"), (case.hparams, *case.data.values()))

    @bilevel_jax.implicit_minimizer(Quadratic(), TIGHT, prox=operator)
    def solve(h, A, b):
        def step(_, w):
            return operator(w - 0.4 * (A @ w - b - h["shift"]), h, 0.4)

        return jax.lax.fori_loop(0, 200, step, jnp.zeros_like(b))

    return lambda h: Distance()(solve(h, A, b), h, target), h


def test_all_modes_and_orders_of_an_elastic_net():
    case = Case(bl.Proximal, prox.elastic_net(), {"l1": -0.5, "l2": -1.0})
    value, h = solved(case.operator, case)
    forward, gradient = jax.jit(jax.jacfwd(value))(h), jax.jit(jax.grad(value))
    for key, slope in case.slopes.items():
        assert relative_error(gradient(h)[key], slope) <= 1e-6
        assert relative_error(forward[key], slope) <= 1e-6

    along = {key: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for key, x in h.items()}
    curved = jax.jit(lambda h: jax.jvp(jax.grad(value), (h,), (along,))[1])(h)
    high, low = (gradient({key: x + step * along[key] for key, x in h.items()}) for step in (1e-5, -1e-5))
    for key, x in curved.items():
        assert relative_error(x, (high[key] - low[key]) / 2e-5) <= 1e-6


def test_bounds_under_vmap():
    case = Case(bl.Projected, projections.box("low", "high"), {"low": -0.5, "high": np.linspace(0.2, 0.9, 8)})
    value, h = solved(case.operator, case)
    rows = jax.tree.map(lambda x: jnp.stack([x, x]), h)
    found = jax.jit(jax.vmap(jax.grad(value)))(rows)
    for key, slope in case.slopes.items():
        assert relative_error(found[key][1], slope) <= 1e-6


def test_an_operator_closes_over_a_traced_value():
    def soft_threshold(limit):
        return lambda v, h, s: jnp.sign(v) * jnp.maximum(jnp.abs(v) - s * h * limit, 0)

    def value(h, limit):
        prox = soft_threshold(limit)
        solve = bilevel_jax.implicit_minimizer(lambda w, h: 0.5 * jnp.sum((w - 3.0) ** 2), TIGHT, prox=prox)
        return jnp.sum(solve(lambda h: prox(jnp.full(2, 3.0), h, 1.0))(h) ** 2)  # 2 (3 − h·limit)²

    by_h, by_limit = jax.grad(value, (0, 1))(jnp.array(0.5), jnp.array(2.0))
    assert relative_error(by_h, -16.0) <= 1e-10
    assert relative_error(by_limit, -4.0) <= 1e-10


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_kink_is_a_warning(compiled):
    soft = prox.l1(1.0)
    solve = bilevel_jax.implicit_minimizer(lambda w, h: 0.5 * jnp.sum((w - h) ** 2), prox=soft)(lambda h: soft(h, h))
    grad = jax.grad(lambda h: solve(h).sum())
    with pytest.warns(bl.InnerProblemWarning, match="at a kink of the proximal step"):
        jax.block_until_ready((jax.jit(grad) if compiled else grad)(jnp.array([1.0, 3.0])))


def test_an_operator_with_a_result_of_another_shape():
    solve = bilevel_jax.implicit_minimizer(lambda w, h: jnp.sum((w - h) ** 2), prox=lambda v, h, s: v.sum())
    with pytest.raises(ValueError, match="prox: expected the structure of params"):
        jax.grad(lambda h: solve(lambda h: h)(h).sum())(jnp.ones(2))


def test_a_step_size_that_fits_the_curvature_keeps_the_digits_of_float32():
    operator, curvature = prox.group_lasso([0, 0, 0], 1e6), 1e6

    def gradient(h, step_size):
        loss = lambda w, h: 0.5 * curvature * jnp.sum((w - h) ** 2)  # noqa: E731
        solve = bilevel_jax.implicit_minimizer(loss, prox=operator, step_size=step_size, on_failure="ignore")
        return jax.grad(lambda h: jnp.arange(3) @ solve(lambda h: h - h / jnp.linalg.norm(h))(h))(h)

    h = jnp.array([2.0, -1.0, 3.0], jnp.float32)
    expected = gradient(h.astype(jnp.float64), 1e-6)
    assert relative_error(gradient(h, 1e-6), expected) <= 1e-6
    assert relative_error(gradient(h, 1.0), expected) > 1e-2


def test_a_problem_in_place_of_the_operator():
    problem = bl.Proximal(Quadratic(), prox.l1(), Distance())
    with pytest.raises(TypeError, match=r"got a Proximal\. Write .*\(problem\.smooth, prox=problem\.prox\)"):
        bilevel_jax.implicit_minimizer(problem.smooth, prox=problem)


def test_params_of_a_wrong_shape_are_named():
    def loss(w, h):
        return jnp.sum((jnp.ones((4, 3)) @ w["a"] - h) ** 2)

    with pytest.raises(TypeError) as caught:
        bilevel_jax.implicit_minimizer(loss)(lambda h: {"a": jnp.ones(2)})(jnp.ones(4))
    assert any("inner received params['a'] of shape (2,)" in note for note in caught.value.__notes__)
