"""Metagradients of JAX runs: batches of several shapes, keys, precisions, and compiled code."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import bilevel as bl  # noqa: E402

T = 7


def outer(state, rate):
    return (state["w"] ** 2).sum()


def decay(state, rate, batch):
    return {"w": state["w"] * (1 - rate * batch.mean())}


def test_batches_of_several_shapes_are_taken_in_order():
    batches = [np.full(n, 0.1 * n + 0.01 * i) for i, n in enumerate((4, 4, 3, 4, 4, 4, 3))]
    factors = np.array([b.mean() for b in batches])
    expected = -4 * np.prod((1 - 0.5 * factors) ** 2) * (factors / (1 - 0.5 * factors)).sum()
    first = {"w": jnp.ones(2)}
    for checkpoints in ("none", "sqrt", 1):
        found = bl.metagradient(bl.Training(decay, outer), first, jnp.asarray(0.5), batches, checkpoints=checkpoints)
        assert float(found.grad) == pytest.approx(expected, rel=1e-12)


def test_a_key_may_be_in_the_state(tmp_path):
    def step(state, rate, batch):
        key, use = jax.random.split(state["key"])
        return {"w": state["w"] * (1 - rate * jax.random.uniform(use)), "key": key}

    def run(rate):
        state = {"w": jnp.ones(2), "key": jax.random.key(1)}
        for _ in range(T):
            state = step(state, rate, None)
        return outer(state, rate)

    first, rate = {"w": jnp.ones(2), "key": jax.random.key(1)}, jnp.asarray(0.3)
    for store in ("device", tmp_path):
        found = bl.metagradient(bl.Training(step, outer), first, rate, steps=T, checkpoints=2, store=store)
        assert float(found.grad) == pytest.approx(float(jax.grad(run)(rate)), rel=1e-12)
        assert found.state_grad["key"] is None


def test_stored_states_keep_bfloat16_to_the_last_bit(tmp_path):
    first, rate = {"w": jnp.linspace(0.1, 3.0, 5, dtype=jnp.bfloat16)}, jnp.asarray(0.25, jnp.bfloat16)

    def step(state, rate, batch):
        return {"w": state["w"] * (1 - rate)}

    kept, stored = (
        bl.metagradient(bl.Training(step, outer), first, rate, steps=T, checkpoints="sqrt", store=store)
        for store in ("device", tmp_path)
    )
    assert stored.state["w"].dtype == jnp.bfloat16
    assert jnp.array_equal(kept.state_grad["w"], stored.state_grad["w"])


def test_a_step_is_traced_once_for_all_blocks_and_calls():
    traces = []

    def step(state, rate, batch):
        traces.append(batch)
        return decay(state, rate, batch)

    args = bl.Training(step, outer), {"w": jnp.ones(2)}, jnp.asarray(0.5), [np.ones(2) * t for t in range(12)]
    bl.metagradient(*args, checkpoints="sqrt", block=3)
    first = len(traces)
    bl.metagradient(*args, checkpoints="sqrt", block=3)
    assert len(traces) == first <= 8


def test_a_call_under_jit_is_named():
    call = jax.jit(lambda w: bl.metagradient(bl.Training(decay, outer), {"w": w}, jnp.ones(()), steps=1).grad)
    with pytest.raises(TypeError, match=r'cannot be called under jit, grad or vmap.*solver="unrolled"'):
        call(jnp.ones(2))


def test_a_step_without_a_hash_is_named():
    class Step:
        __hash__ = None

        def __call__(self, state, rate, batch):
            return state

    with pytest.raises(TypeError, match=r"step: a Step has no hash.*frozen dataclass"):
        bl.metagradient(bl.Training(Step(), outer), {"w": jnp.ones(2)}, jnp.ones(()), steps=1)


def test_a_square_root_at_zero_is_located():
    def step(state, rate, batch):
        return {"w": state["w"] - rate * jnp.sqrt(state["w"] * batch)}

    batches = [np.ones(2), np.ones(2), np.zeros(2), np.ones(2)]
    first, training = {"w": jnp.ones(2)}, bl.Training(step, outer)
    with pytest.raises(bl.SolverError, match="not finite between the steps 2 and 3, but the run itself is"):
        bl.metagradient(training, first, jnp.asarray(0.1), batches, checkpoints="all")


def step(w, rate, batch):
    return w * (1 - rate * batch)


def total(w, rate):
    return w.sum()


def run(step=step, w=None, rate=0.5, batches=(0.1, 0.2), outer=total, **options):
    first = jnp.ones(2) if w is None else w
    return bl.metagradient(bl.Training(step, outer), first, jnp.asarray(rate), list(batches), **options)


@pytest.mark.parametrize(
    "call",
    [
        jax.jit(lambda rate: run(rate=rate).grad),
        jax.grad(lambda rate: run(rate=rate).value),
        jax.jit(lambda x: run(batches=[x, x + 1]).grad),
        jax.jit(lambda x: run(lambda w, rate, batch: w * rate * x).grad),
    ],
    ids=["jit", "grad", "batches", "closure"],
)
def test_calls_inside_of_transforms_are_refused(call):
    with pytest.raises(TypeError, match="cannot be called under jit, grad or vmap"):
        call(jnp.asarray(0.5))


@pytest.mark.parametrize("names", ["aab", "aaa"])
def test_text_in_batches_is_constant(names):
    def by_name(w, rate, batch):
        return w * (rate if batch["name"] == "a" else rate**2)

    batches = [{"name": name, "x": np.ones(i % 2)} for i, name in enumerate(names)]
    powers = sum({"a": 1, "b": 2}[name] for name in names)
    found = run(by_name, batches=batches, checkpoints="sqrt")
    assert float(found.grad) == pytest.approx(2 * powers * 0.5 ** (powers - 1))


def test_a_state_that_is_cut_is_named():
    with pytest.warns(bl.DependenceWarning, match=r"the next state does not depend on .* stop_gradient"):
        run(lambda w, rate, batch: step(jax.lax.stop_gradient(w), rate, batch))


def test_complex_arrays_are_refused_unless_they_are_constants():
    first = {"w": jnp.ones(2), "z": jnp.ones(2, complex)}

    def outer(state, rate):
        return (state["w"] + state["z"].real).sum()

    def turn(state, rate, batch):
        return {"w": state["w"] * rate, "z": state["z"] * jnp.exp(1j * rate)}

    def keep(state, rate, batch):
        return {"w": state["w"] * rate * state["z"].real, "z": state["z"]}

    with pytest.raises(TypeError, match=r"state\['z'\]: derivatives do not flow through complex arrays"):
        run(turn, first, outer=outer)
    assert float(run(keep, first, outer=outer).grad) == pytest.approx(2 * 2 * 0.5)


def test_a_constant_that_changes_is_named():
    with pytest.raises(ValueError, match=r"constants \['first'\], got .* with \['later'\]. Only arrays may change"):
        run(lambda state, rate, batch: {"w": state["w"], "phase": "later"}, {"w": jnp.ones(2), "phase": "first"})


def test_numbers_in_batches_have_the_default_precision():
    with pytest.raises(TypeError, match=r"step is float64, but state is float32: .* in a batch .* array of float64"):
        run(w=jnp.ones(2, jnp.float32), rate=np.float32(0.5))
    found = run(w=jnp.ones(2, jnp.float32), rate=np.float32(0.5), batches=np.float32([0.1, 0.2]))
    assert found.grad.dtype == jnp.float32
