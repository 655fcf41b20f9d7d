"""Derivatives through the optimizers of optax, against central differences of the run with optax's own update."""

from functools import partial
from inspect import signature

import numpy as np
import pytest
from frameworks import relative_error

jax = pytest.importorskip("jax")
jnp = jax.numpy
optax = pytest.importorskip("optax")
bilevel_jax = pytest.importorskip("bilevel_jax")
from jax import lax  # noqa: E402
from optax import contrib  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.standard_normal((8, 3))), jnp.asarray(RNG.standard_normal(8))
PARAMS = jnp.asarray(RNG.standard_normal((4, 4)) / 2)  # one leaf, since compiling is most of the time
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WEIGHTS = jnp.asarray(RNG.standard_normal(8) / 5)
DIRECTION = jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape)), (PARAMS, WEIGHTS))
STEP, STEPS = 1e-5, 4
# Newer versions of optax accumulate in float32 otherwise.
IN_FLOAT64 = {"accumulator_dtype": jnp.float64} if "accumulator_dtype" in signature(optax.MultiSteps).parameters else {}
BACKTRACKING = partial(optax.scale_by_backtracking_linesearch, max_backtracking_steps=4)

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "rprop": lambda: optax.rprop(0.01),
    "yogi": lambda: optax.yogi(0.05),
    "sm3": lambda: optax.sm3(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "rmsprop": lambda: optax.rmsprop(0.05),
    "rmsprop centered": lambda: optax.rmsprop(0.05, centered=True),
    "rmsprop, eps outside the root": lambda: optax.rmsprop(0.05, eps_in_sqrt=False),
    "adagrad": lambda: optax.adagrad(0.1),
    "adagrad from zero": lambda: optax.adagrad(0.1, initial_accumulator_value=0.0),
    "adadelta": lambda: optax.adadelta(1.0),
    "adamax": lambda: optax.adamax(0.05),
    "adabelief": lambda: optax.adabelief(0.05),
    "adan": lambda: optax.adan(0.05),
    "acprop": lambda: contrib.acprop(0.05),
    "cocob": lambda: contrib.cocob(),
    "adafactor": lambda: optax.adafactor(0.05),
    "adafactor, factored": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2),
    "lars": lambda: optax.lars(0.1),
    "novograd": lambda: optax.novograd(0.05),
    "muon": lambda: contrib.muon(0.05),
    "sam": lambda: contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "momo": lambda: contrib.momo(0.1),
    "dowg": lambda: contrib.dowg(),
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05),
    "nadam": lambda: optax.nadam(0.05),
    "amsgrad": lambda: optax.amsgrad(0.05),
    "lamb": lambda: optax.lamb(0.05),
    "prodigy": lambda: contrib.prodigy(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "ademamix": lambda: contrib.ademamix(0.05),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.05),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "radam": lambda: optax.radam(0.05),
    "lbfgs": lambda: optax.lbfgs(0.3, linesearch=None),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "dog": lambda: contrib.dog(),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.5),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), BACKTRACKING()),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(0.05)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.05), optax.sgd(0.5)),
    "normalize_by_update_norm": lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.sgd(0.5)),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.05), 2, **IN_FLOAT64),
}
NEEDS = ("momo", "polyak_sgd", "backtracking", "reduce_on_plateau")  # value, grad and value_fn
UNDEFINED = ("sam", "prodigy", "dadapt_adamw")  # the run itself returns nan if all gradients are zero


def loss(params, weights, x, scale):
    return scale * jnp.mean(jnp.exp(weights) * (jnp.tanh(x @ params[:3]) @ params[3] - Y) ** 2)


def run(optimizer, extra, point, x, scale):
    """Return the validation loss after a few steps."""
    params, weights = point
    of_params = partial(loss, weights=weights, x=x, scale=scale)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(of_params)(params)
        more = {"value": value, "grad": grad, "value_fn": of_params} if extra else {}
        updates, state = optimizer.update(grad, state, params, **more)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return loss(params, jnp.zeros(8), X[::-1], 1.0)


def derivatives(optimizer, extra, x, scale):
    """Return a directional derivative of the run by reverse mode, and by central differences of the plain run."""
    right = bilevel_jax.differentiable(optimizer)
    grad = jax.grad(partial(run, right, extra))((PARAMS, WEIGHTS), x, scale)
    found = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grad, DIRECTION)), strict=True))

    def at(t):
        return run(optimizer, extra, jax.tree.map(lambda w, d: w + t * d, (PARAMS, WEIGHTS), DIRECTION), x, scale)

    far, near, forward, further = lax.map(at, STEP * jnp.array([-2.0, -1.0, 1.0, 2.0]))
    return found, (8 * (forward - near) - (further - far)) / (12 * STEP)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_of_a_run_match_central_differences(name):
    both = jax.jit(partial(derivatives, OPTIMIZERS[name](), name in NEEDS), compiler_options=QUICKLY)
    cases = {"ordinary": (X, 1.0), "a zero column": (X.at[:, 0].set(0), 1.0), "all gradients zero": (X, 0.0)}
    if name in UNDEFINED:
        del cases["all gradients zero"]
    for case, args in cases.items():
        found, expected = both(*args)
        assert abs(found - expected) < 1e-6 * abs(expected), case


@pytest.mark.parametrize("name", ["adam", "radam", "lbfgs", "adafactor", "MultiSteps"])
def test_compiled_updates_equal_those_of_optax_to_the_last_bit(name):
    optimizer = OPTIMIZERS[name]()
    right = bilevel_jax.differentiable(optimizer)
    first, second = (jax.jit(lambda *args, rule=rule: rule.update(*args)) for rule in (optimizer, right))
    mine = theirs = optimizer.init(PARAMS)
    for i in range(3):
        grad = jax.tree.map(lambda w, i=i: jnp.sin(w + i), PARAMS)
        expected, theirs = first(grad, theirs, PARAMS)
        updates, mine = second(grad, mine, PARAMS)
        assert jax.tree.structure((updates, mine)) == jax.tree.structure((expected, theirs))
        for a, b in zip(jax.tree.leaves((updates, mine)), jax.tree.leaves((expected, theirs)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_an_update_that_is_not_compiled_equals_that_of_optax():
    rule = optax.adam(0.1)
    found, expected = (r.update(PARAMS, rule.init(PARAMS))[0] for r in (bilevel_jax.differentiable(rule), rule))
    assert relative_error(found, expected) < 1e-14


def test_forward_mode_and_batches_agree_with_reverse_mode():
    of_weights = lambda weights: run(bilevel_jax.differentiable(optax.adam(0.05)), False, (PARAMS, weights), X, 1.0)  # noqa: E731
    both = lambda w, rows: (jax.jacfwd(of_weights)(w), jax.vmap(jax.grad(of_weights))(rows))  # noqa: E731
    forward, rows = jax.jit(both, compiler_options=QUICKLY)(WEIGHTS, jnp.stack([WEIGHTS, 2 * WEIGHTS]))
    assert relative_error(forward, rows[0]) < 1e-10


def test_the_second_derivative_is_finite_at_a_zero_gradient():
    """One step of adam from g = (x, 0) with eps = 1 moves by -x / (|x| + 1)."""

    def trained(x):
        rule = bilevel_jax.differentiable(optax.adam(1.0, eps=1.0))
        return rule.update(jnp.array([1.0, 0.0]) * x, rule.init(jnp.zeros(2)))[0].sum()

    orders = jax.grad(trained), jax.grad(jax.grad(trained)), jax.hessian(trained)
    found = jax.jit(lambda x: [order(x) for order in orders], compiler_options=QUICKLY)(1.0)
    assert found == pytest.approx([-1 / 4, 2 / 8, 2 / 8])


def test_control_flow_keeps_its_values_and_gets_finite_derivatives():
    """Each construct computes sqrt(x) or a sum of it, at x = 0, times zero."""

    def update(x, state, params=None):
        def root(x):
            return jnp.sqrt(x) * 0.0 + x

        looped, _ = lax.scan(lambda c, _: (root(c), None), x, length=2)
        chosen = lax.cond(x.sum() > -1, root, jnp.cos, looped)
        kept = jax.checkpoint(root)(chosen)
        return jax.jit(root)(kept), lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, root(c[1])), (0, x))

    right = bilevel_jax.differentiable(optax.GradientTransformation(lambda params: None, update))
    zero = jnp.zeros(2)
    reverse = jax.jit(jax.jacrev(lambda x: right.update(x, None)[0]))(zero)
    np.testing.assert_array_equal(reverse, np.eye(2))
    _, ((_, of_loop),) = jax.jvp(lambda x: right.update(x, None)[1:], (zero,), (jnp.ones(2),))
    np.testing.assert_array_equal(of_loop, [1.0, 1.0])
    np.testing.assert_array_equal(right.update(jnp.ones(2), None)[0], [1.0, 1.0])


def test_an_own_rule_is_kept():
    @jax.custom_jvp
    def root(x):
        return jnp.sqrt(x)

    root.defjvp(lambda x, t: (root(*x), 5 * t[0]))
    right = bilevel_jax.differentiable(optax.stateless(lambda updates, _: root(updates)))
    assert jax.grad(lambda x: right.update(x, optax.EmptyState())[0])(4.0) == 5


def test_stop_gradient_hides_nothing():
    rule = optax.stateless(lambda updates, _: updates * lax.stop_gradient(updates))
    assert jax.grad(lambda x: rule.update(x, optax.EmptyState())[0])(3.0) == 3
    assert jax.grad(lambda x: bilevel_jax.differentiable(rule).update(x, optax.EmptyState())[0])(3.0) == 6


def test_the_result_keeps_the_type_and_equals_another_one():
    rule = optax.adam(0.1)
    right = bilevel_jax.differentiable(rule)
    assert type(right) is type(rule)
    assert right == bilevel_jax.differentiable(rule) == bilevel_jax.differentiable(right)
    assert hash(right) == hash(bilevel_jax.differentiable(rule))
    steps = bilevel_jax.differentiable(optax.MultiSteps(rule, 2))
    assert isinstance(steps, optax.MultiSteps)
    assert not steps.has_updated(steps.init(PARAMS))


def test_an_object_without_update_raises():
    with pytest.raises(TypeError, match=r"optimizer: expected an optimizer with init and update, .* got float"):
        bilevel_jax.differentiable(0.1)
