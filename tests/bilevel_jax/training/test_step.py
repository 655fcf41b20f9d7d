"""Training steps: values of optax's loops, and derivatives by numbers, auxiliary states and data."""

from functools import partial
from inspect import signature

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
optax = pytest.importorskip("optax")
bilevel_jax = pytest.importorskip("bilevel_jax")
from jax import lax  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

from bilevel_jax import TrainingStep  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.standard_normal((4, 6, 3))), jnp.asarray(RNG.standard_normal((4, 6)))
PARAMS = {"a": jnp.asarray(RNG.standard_normal((3, 4)) / 2), "b": jnp.asarray(RNG.standard_normal(4) / 2)}
STEP = 1e-5
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Newer versions of optax accumulate in float32 otherwise.
IN_FLOAT64 = {"accumulator_dtype": jnp.float64} if "accumulator_dtype" in signature(optax.MultiSteps).parameters else {}


def loss(params, hparams, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def after(step, hparams, aux=None):
    """Return the state after four steps."""
    state = step.init(PARAMS, hparams, aux)
    return lax.scan(lambda state, batch: (jax.checkpoint(step)(state, hparams, batch), None), state, (X, Y))[0]


def validation(step, hparams):
    return loss(after(step, hparams).params, None, (X[0, ::-1], Y[0]))


def of_adam(h):
    rule = optax.adam(h["learning_rate"], h["b1"], h["b2"], h["eps"])
    return optax.chain(optax.clip_by_global_norm(h["clip"]), rule)


def of_decay(h):
    return optax.adamw(h["learning_rate"], weight_decay=h["decay"])


def of_momentum(h):
    return optax.sgd(lambda count: h["first"] * 0.7**count, momentum=h["momentum"])


def of_schedule(h):
    schedule = optax.cosine_decay_schedule(h["first"], 8, h["alpha"])
    rule = optax.adamw(schedule, eps=0.1, weight_decay=h["decay"])
    return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(h["clip"]), rule), 2, **IN_FLOAT64)


NUMBERS = {
    of_adam: {"learning_rate": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "clip": 0.3},
    of_decay: {"learning_rate": 0.05, "decay": 0.2},
    of_momentum: {"first": 0.1, "momentum": 0.8},
    of_schedule: {"first": 0.1, "alpha": 0.1, "decay": 0.2, "clip": 0.2},
}


@pytest.mark.parametrize("optimizer", NUMBERS, ids=lambda function: function.__name__)
def test_numbers_of_the_optimizer_are_hyperparameters(optimizer):
    hparams = jax.tree.map(jnp.asarray, NUMBERS[optimizer])
    of_hparams = partial(validation, TrainingStep(loss, optimizer))
    found = jax.jit(jax.grad(of_hparams), compiler_options=QUICKLY)(hparams)
    of_hparams = jax.jit(of_hparams, compiler_options=QUICKLY)
    for name, value in hparams.items():
        h = STEP * float(value)
        far, near, forward, further = (float(of_hparams(hparams | {name: value + k * h})) for k in (-2, -1, 1, 2))
        expected = (8 * (forward - near) - (further - far)) / (12 * h)
        assert abs(found[name] - expected) < 1e-6 * abs(expected) + 1e-12, name


@pytest.mark.parametrize("mixed_mode", [True, False])
def test_steps_equal_a_loop_of_optax(mixed_mode):
    rule = optax.adamw(0.05)
    step = TrainingStep(loss, rule, mixed_mode=mixed_mode)
    state, params, inner = step.init(PARAMS), PARAMS, rule.init(PARAMS)

    @jax.jit
    def plain(params, inner, batch):
        updates, inner = rule.update(jax.grad(loss)(params, None, batch), inner, params)
        return optax.apply_updates(params, updates), inner

    run = jax.jit(step)
    for batch in zip(X, Y, strict=True):
        state = run(state, None, batch)
        params, inner = plain(params, inner, batch)
    for a, b in zip(jax.tree.leaves(state[:2]), jax.tree.leaves((params, inner)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_line_search_receives_the_loss():
    rule = optax.chain(optax.sgd(30.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=40))
    step = TrainingStep(loss, rule)
    state = step(step.init(PARAMS), None, (X[0], Y[0]))
    before, then = (loss(params, None, (X[0], Y[0])) for params in (PARAMS, state.params))
    assert then < before
    assert state.optimizer[1].learning_rate < 1


def with_state(params, hparams, batch, aux):
    """Normalize by running means, as BatchNorm does in evaluation. Draw dropout from a key in the state."""
    x, y = batch
    key, new = jax.random.split(aux["key"])
    mean = 0.5 * aux["mean"] + 0.5 * jnp.mean(x @ params["a"], 0)
    outputs = jnp.tanh(x @ params["a"] - mean) * jax.random.bernoulli(new, 0.7, (4,)) @ params["b"]
    return jnp.mean((hparams * outputs - y) ** 2), {"key": key, "mean": mean, "count": aux["count"] + 1}


@pytest.mark.parametrize("mixed_mode", [True, False])
def test_derivatives_flow_through_an_auxiliary_state(mixed_mode):
    step = TrainingStep(with_state, optax.adam(0.05), mixed_mode=mixed_mode, has_aux=True)
    aux = {"key": jax.random.key(3), "mean": jnp.zeros(4), "count": jnp.array(0)}

    def of_mean(hparams, start):
        state = after(step, hparams, aux | {"mean": start})
        return jnp.sum(state.aux["mean"] ** 2) + jnp.sum(state.params["b"]), state.aux["count"]

    point = jnp.array(0.9), jnp.array([0.1, -0.2, 0.3, 0.0])
    (found, count) = jax.jit(jax.grad(of_mean, (0, 1), has_aux=True), compiler_options=QUICKLY)(*point)
    assert count == 4
    flat, unravel = ravel_pytree(point)
    along = jax.jit(lambda t: of_mean(*unravel(flat + t * jnp.arange(1.0, 6.0)))[0], compiler_options=QUICKLY)
    expected = (along(STEP) - along(-STEP)) / (2 * STEP)
    assert jnp.vdot(ravel_pytree(found)[0], jnp.arange(1.0, 6.0)) == pytest.approx(float(expected), rel=1e-6)


def test_float32_weights_keep_their_dtype_with_float64_numbers():
    """A loop cannot carry a state whose dtypes change."""
    step = TrainingStep(lambda w, h, x: jnp.sum((w - x) ** 2), lambda h: optax.adam(h, 0.9 * h, mu_dtype=None))
    state = step.init(jnp.ones(2, jnp.float32), jnp.array(0.5))
    new = step(state, jnp.array(0.5), jnp.ones(2, jnp.float32))
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]


def test_steps_are_equal_by_value():
    rule = optax.adam(0.1)
    assert TrainingStep(loss, rule) == TrainingStep(loss, rule)
    assert hash(TrainingStep(loss, rule)) == hash(TrainingStep(loss, rule))
    assert TrainingStep(loss, rule) != TrainingStep(loss, rule, mixed_mode=False)


def test_states_of_flax_and_equinox():
    """Both networks compute x @ w + b, like the plain tree."""
    nnx, eqx = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")
    w, b = PARAMS["a"], PARAMS["b"]
    graph, of_flax, rest = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64), nnx.Param, ...)
    of_flax = jax.tree.map(lambda leaf: w if leaf.ndim == 2 else b, of_flax)
    model = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.bias), model, (w.T, b))
    of_equinox, static = eqx.partition(model, eqx.is_inexact_array)
    networks = [
        (PARAMS, lambda p, x: x @ p["a"] + p["b"]),
        (of_flax, lambda p, x: nnx.merge(graph, p, rest)(x)),
        (of_equinox, lambda p, x: jax.vmap(eqx.combine(p, static))(x)),
    ]
    results = []
    for params, network in networks:
        step = TrainingStep(lambda p, h, x, net=network: jnp.mean(h[:, None] * net(p, x) ** 4), optax.adam(0.1))

        def metagradient(h, step=step, params=params):
            state = lax.scan(lambda state, _: (step(state, h, X[0]), None), step.init(params), length=2)[0]
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state.params))

        results.append(jax.jit(jax.grad(metagradient), compiler_options=QUICKLY)(jnp.arange(1.0, 7.0)))
    assert relative_error(results[1], results[0]) < 1e-10
    assert relative_error(results[2], results[0]) < 1e-10


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TrainingStep(loss, "adam"),
            TypeError,
            "optimizer: expected an optimizer with init and update, .* str",
        ),
        (
            lambda: TrainingStep(loss, lambda h: h).init(PARAMS, 0.1),
            TypeError,
            r"optimizer\(hparams\): expected an optimizer .* got float",
        ),
        (
            lambda: TrainingStep(optax.sgd(0.1), loss),
            TypeError,
            r"loss: expected a function of \(params, hparams, batch\), got an optimizer\. The loss comes first",
        ),
        (lambda: TrainingStep("mse", optax.sgd(0.1)), TypeError, "loss: expected a function .*, got str"),
        (lambda: bilevel_jax.mixed_mode_grad(3), TypeError, r"loss: expected a function of \(params, .*, got int"),
        (lambda: TrainingStep(loss, of_adam).init(PARAMS), ValueError, r"hparams: .* step.init\(params, hparams\)"),
        (
            lambda: TrainingStep(loss, optax.sgd(0.1)).init(PARAMS, aux=1),
            ValueError,
            r"aux: .* TrainingStep\(..., has_aux=True\)",
        ),
        (
            lambda: after(TrainingStep(lambda p, h, b, aux: loss(p, h, b), optax.sgd(0.1), has_aux=True), None),
            TypeError,
            r"loss: expected a pair \(scalar, new aux\)",
        ),
        (
            lambda: after(TrainingStep(lambda p, h, b: p["b"], optax.sgd(0.1), mixed_mode=False), None),
            ValueError,
            "loss: expected a scalar, got an array of shape",
        ),
    ],
)
def test_mistakes_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("mixed_mode", [True, False])
class TestHyperparametersWithoutInfluence:
    """The rule of mixed_mode must not hide that a loss does not use them."""

    def metagradient(self, mixed_mode, loss):
        step = TrainingStep(loss, optax.sgd(0.1), mixed_mode=mixed_mode)
        training = bl.Training(step, lambda state, h: (state.params**2).sum())
        hparams = {"used": jnp.ones(2), "forgotten": jnp.ones(2)}
        return bl.metagradient(training, step.init(jnp.ones(2)), hparams, steps=1).grad

    def test_all(self, mixed_mode):
        with pytest.raises(ValueError, match=r"^Neither step nor outer depends on hparams\['forgotten'\] and hparams"):
            self.metagradient(mixed_mode, lambda w, h, b: (w**2).sum())

    def test_all_because_the_params_are_cut(self, mixed_mode):
        with pytest.raises(ValueError, match=r"^Neither step nor outer depends on hparams"):
            self.metagradient(mixed_mode, lambda w, h, b: (h["used"] * lax.stop_gradient(w) ** 2).sum())

    def test_one_leaf(self, mixed_mode):
        with pytest.warns(bl.DependenceWarning, match=r"^Neither step nor outer depends on hparams\['forgotten'\]: "):
            grad = self.metagradient(mixed_mode, lambda w, h, b: (h["used"] * w**2).sum())
        # w = 1 - 0.2 h, F = w²
        np.testing.assert_allclose(grad["used"], -0.4 * 0.8 * np.ones(2), rtol=1e-6)
        np.testing.assert_array_equal(grad["forgotten"], 0)


def test_injected_hyperparameters_are_refused():
    step = TrainingStep(lambda w, h, b: (w**2).sum(), lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h))
    with pytest.raises(ValueError, match=r"optax.inject_hyperparams keeps .* does not depend on hparams. Leave it out"):
        step.init(jnp.ones(2), jnp.asarray(0.1))


def test_a_step_needs_its_own_state():
    step = TrainingStep(lambda w, h, b: (w**2).sum(), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"state: expected the result of TrainingStep.init, got ArrayImpl"):
        step(jnp.ones(2), None, None)
