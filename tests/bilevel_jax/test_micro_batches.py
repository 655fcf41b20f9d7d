"""Micro-batches in compiled code."""

import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning")


def inner(w, h, x, y):
    return jnp.mean((jnp.tanh(x @ w["A"]) @ w["b"] - y) ** 2) + jnp.exp(h) * sum(jnp.sum(v**2) for v in w.values())


def outer(w, h, x, y):
    return jnp.mean((jnp.tanh(x @ w["A"]) @ w["b"] - y) ** 2)


PROBLEM, SOLVER = bl.Problem(inner, outer), bl.CG(damping=2.0, rtol=1e-12)


def point(samples=22, width=5):
    keys = jax.random.split(jax.random.key(0), 4)
    w = {"A": jax.random.normal(keys[0], (3, width)), "b": jax.random.normal(keys[1], (width,))}
    return w, jnp.zeros(()), (jax.random.normal(keys[2], (samples, 3)), jax.random.normal(keys[3], (samples,)))


def step(w, h, train, val):
    return bl.hypergradient(PROBLEM, w, h, inner_args=train, outer_args=val, solver=SOLVER)


def by_size(args):
    return bl.MicroBatches(args, size=5)


def in_a_list(args):
    return bl.MicroBatches([tuple(a[i : i + 4] for a in args) for i in range(0, 22, 4)])


@pytest.mark.parametrize("split", [by_size, in_a_list])
def test_under_jit(split):
    w, h, args = point()
    expected = step(w, h, args, args)
    found = jax.jit(lambda w, h, args: step(w, h, split(args), split(args)))(w, h, args)
    assert relative_error(found.grad, expected.grad) <= 1e-10
    assert relative_error(found.value, expected.value) <= 1e-12


def test_values_of_python_stay_python_in_a_list():
    """A flag may steer the trace, also if it differs between micro-batches."""
    w, h, (x, y) = point()

    def flagged(w, h, x, y, double):
        return (2 if double else 1) * inner(w, h, x, y)

    batches = [(x[i : i + 2], y[i : i + 2], i < 8) for i in range(0, 22, 2)]
    found = bl.hypergradient(
        bl.Problem(flagged, outer), w, h, inner_args=bl.MicroBatches(batches), outer_args=(x, y), solver=SOLVER
    )
    weights = [2.0 if i < 8 else 1.0 for i in range(0, 22, 2)]
    parts = bl.MicroBatches((x, y), size=2, reduction="sum", weights=[v / 11 for v in weights])
    expected = bl.hypergradient(PROBLEM, w, h, inner_args=parts, outer_args=(x, y), solver=SOLVER)
    assert relative_error(found.grad, expected.grad) <= 1e-10


def test_vmap_over_hyperparameters():
    w, _, args = point()
    parts, hs = by_size(args), jnp.array([0.0, 0.5])
    found = jax.vmap(lambda h: step(w, h, parts, parts).grad)(hs)
    assert relative_error(found, jnp.array([step(w, h, args, args).grad for h in hs])) <= 1e-10


def test_memory_is_that_of_one_micro_batch():
    """The last micro-batch is smaller, and has its own code. The number of traces does not depend on their number."""
    traces, memory = [], []

    def counted(w, h, x, y):
        traces.append(0)
        return inner(w, h, x, y)

    for samples in (100, 390, 3190):
        w, h, args = point(samples, width=400)
        problem, val = bl.Problem(counted, outer), tuple(a[:100] for a in args)
        traces.clear()

        def run(w, h, args, problem=problem, val=val):
            parts = args if len(args[0]) == 100 else bl.MicroBatches(args, size=100)
            return bl.hypergradient(problem, w, h, inner_args=parts, outer_args=val, solver=SOLVER)

        compiled = jax.jit(run).lower(w, h, args).compile()
        memory.append((compiled.memory_analysis().temp_size_in_bytes, len(traces)))
    (one, _), few, many = memory
    assert few[1] == many[1]
    assert many[0] <= 1.01 * few[0]  # a weight for each micro-batch
    assert many[0] <= 1.1 * one
