"""Gradients whose derivatives are forward over reverse."""

import pytest
from frameworks import relative_error

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")
from jax.flatten_util import ravel_pytree  # noqa: E402

KEY = jax.random.key(0)
PARAMS = {"a": jax.random.normal(KEY, (4, 3)) / 2, "b": jnp.arange(3.0)}
HPARAMS = {"weight": jnp.arange(1.0, 6.0), "decay": jnp.array(0.2)}
X, Y = jax.random.normal(jax.random.key(1), (5, 4)), jnp.array([0, 1, 2, 3, 4])


def loss(params, hparams, x, y, key):
    """A loss with integers, a key, and weights of examples."""
    kept = jax.random.bernoulli(key, 0.8, (3,))
    outputs = (jnp.tanh(x @ params["a"] + params["b"]) * kept) ** 2
    return jnp.mean(hparams["weight"][y] * outputs.sum(1)) + hparams["decay"] * jnp.sum(params["a"] ** 2)


def trained(gradient):
    """Return the function (params, hparams, x) -> a loss after two steps."""

    def function(params, hparams, x):
        for _ in range(2):
            grad = gradient(params, hparams, x, Y, KEY)
            params = jax.tree.map(lambda w, g: w - 0.1 * g - g**2, params, grad)
        return jnp.sum(params["a"] ** 3) + jnp.sum(jnp.sin(params["b"]))

    return function


MIXED, PLAIN = (
    jax.jit(jax.value_and_grad(trained(g(loss)), (0, 1, 2))) for g in (bilevel_jax.mixed_mode_grad, jax.grad)
)


def test_the_gradient_equals_that_of_jax():
    found = bilevel_jax.mixed_mode_grad(loss)(PARAMS, HPARAMS, X, Y, KEY)
    expected = jax.grad(loss)(PARAMS, HPARAMS, X, Y, KEY)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative_error(ravel_pytree(found)[0], ravel_pytree(expected)[0]) == 0


def test_its_derivative_equals_reverse_over_reverse():
    (value, found), (other, expected) = MIXED(PARAMS, HPARAMS, X), PLAIN(PARAMS, HPARAMS, X)
    assert value == pytest.approx(float(other), rel=1e-12)
    assert relative_error(ravel_pytree(found)[0], ravel_pytree(expected)[0]) < 1e-12


def test_it_maps_over_batches():
    rows = jax.jit(jax.vmap(jax.grad(trained(bilevel_jax.mixed_mode_grad(loss)), 2), (None, None, 0)))
    found = rows(PARAMS, HPARAMS, jnp.stack([X, 2 * X]))
    for row, x in zip(found, (X, 2 * X), strict=True):
        assert relative_error(row, PLAIN(PARAMS, HPARAMS, x)[1][2]) < 1e-10


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit])
def test_values_that_the_loss_closes_over_are_differentiated(wrap):
    def of(gradient, h):
        return jnp.sum(wrap(gradient(lambda w: jnp.sum(jnp.sin(h * w))))(jnp.array([1.0, 2.0])) ** 2)

    found, expected = (jax.grad(of, 1)(g, 0.7) for g in (bilevel_jax.mixed_mode_grad, jax.grad))
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_only_the_arguments_are_stored():
    """A reverse mode of the plain gradient stores an array for each layer."""

    def deep(w, h):
        x = h
        for _ in range(20):
            x = jnp.sin(x * w)
        return jnp.sum(x)

    def stored(gradient):
        _, pull = jax.eval_shape(lambda w, h: jax.vjp(gradient(deep), w, h), jnp.ones(50), jnp.ones(50))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert stored(bilevel_jax.mixed_mode_grad) <= 3 * 50
    assert stored(jax.grad) > 20 * 50


def test_a_rule_that_is_no_derivative_has_no_symmetric_hessian():
    """The gradient is (2 w0 w1, w0²) without its second entry, so its Jacobian is not symmetric."""

    @jax.custom_vjp
    def masked(w):
        return w

    masked.defvjp(lambda w: (w, None), lambda _, g: (g * jnp.array([1.0, 0.0]),))

    def function(w):
        return masked(w)[0] ** 2 * masked(w)[1]

    w = jnp.array([3.0, 5.0])
    found, expected = (
        jax.grad(lambda w, g=g: jnp.sum(jnp.array([7.0, 1.0]) * g(function)(w)))(w)
        for g in (bilevel_jax.mixed_mode_grad, jax.grad)
    )
    assert relative_error(found, expected) == 0


def test_forward_mode_raises():
    gradient = bilevel_jax.mixed_mode_grad(lambda w: jnp.sum(w**3))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(gradient, (jnp.ones(2),), (jnp.ones(2),))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda w: w, ValueError, r"loss: expected a scalar, got an array of shape \(2,\)"),
        (lambda w: (w.sum(), 1), TypeError, "loss: expected a scalar array, got tuple"),
        (lambda w: jnp.sum(w > 0), TypeError, "loss: expected a floating-point scalar, got int"),
    ],
)
def test_a_loss_without_a_scalar_raises(function, error, message):
    with pytest.raises(error, match=message):
        bilevel_jax.mixed_mode_grad(function)(jnp.ones(2))
