"""An unroll is the derivative of its program, with any batches, truncation and way to store it."""

import itertools

import numpy as np
import pytest
from frameworks import DTYPES, framework, relative_error, tolerance
from hypothesis import given
from hypothesis import strategies as st
from unrolled_cases import OPTIMIZERS, STEPS, WAYS, Quartic

from bilevel import Status


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("batches", "truncation"), [(None, None), (3, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_differentiates_the_program(backend, way, optimizer, batches, truncation, dtype):
    """Against complex steps through the same loop, written out: the same grad, end and value."""
    case, options = Quartic(dtype=dtype), {**OPTIMIZERS[optimizer], "truncation": truncation}
    hg = case.hypergradient(backend, batches, **options, **WAYS[way])
    params, value, grad = case.by_hand(batches, **options)
    assert relative_error(backend.to_numpy(hg.grad), grad) <= tolerance(dtype, condition=20)
    assert relative_error(backend.to_numpy(hg.params), params) <= tolerance(dtype)
    assert relative_error(backend.to_host(hg.value), value) <= tolerance(dtype)
    for tree in (hg.grad, hg.adjoint, hg.params, hg.value):
        assert backend.to_numpy(tree).dtype == dtype
    assert hg.info.steps == STEPS
    assert hg.info.status is Status.CONVERGED


@pytest.mark.parametrize("name", ["numpy", "torch"])  # in JAX, each compiles
@pytest.mark.parametrize(("batches", "truncation"), [(1, None), (3, None), (2, 1), (None, 20)])
def test_it_differentiates_the_program_with_any_batches_and_truncation(name, batches, truncation):
    backend, case = framework(name), Quartic()
    for optimizer, way in itertools.product(OPTIMIZERS.values(), WAYS.values()):
        hg = case.hypergradient(backend, batches, truncation=truncation, **optimizer, **way)
        expected = case.by_hand(batches, truncation=truncation and min(truncation, STEPS), **optimizer)[2]
        assert relative_error(backend.to_numpy(hg.grad), expected) <= 1e-12


def test_the_batches_matter():
    """Else the test above would not tell a wrong one."""
    numpy, case = framework("numpy"), Quartic()
    grads = [case.hypergradient(numpy, batches, step_size=0.05).grad for batches in (None, 2, 3)]
    assert all(relative_error(a, b) > 0.01 for a, b in itertools.combinations(grads, 2))


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 30),
    truncation=st.none() | st.integers(1, 30),
    batches=st.sampled_from([None, 1, 2, 3]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_all_ways_agree_and_what_is_stored_to_the_bit(name, seed, steps, truncation, batches, optimizer):
    backend, case = framework(name), Quartic(seed)
    options = {**OPTIMIZERS[optimizer], "steps": steps, "truncation": truncation}
    plain, checkpointed, forward = (case.hypergradient(backend, batches, **options, **way) for way in WAYS.values())
    iterates = case.hypergradient(backend, batches, **options)  # in torch, plain keeps graphs
    for other in (checkpointed, iterates):
        for a, b in zip(plain[:4], other[:4], strict=True):
            assert (backend.to_numpy(a) == backend.to_numpy(b)).all()
        assert plain.info == other.info
    scale = 1 + np.linalg.norm(backend.to_numpy(plain.grad))
    if np.isfinite(scale):  # w⁴ may drive a drawn start apart
        difference = backend.to_numpy(plain.grad) - backend.to_numpy(forward.grad)
        assert np.linalg.norm(difference) <= 1e-9 * scale


def test_checkpoints_agree_in_jax_to_rounding():
    jax, case = framework("jax"), Quartic()
    options = {**OPTIMIZERS["adam"], "truncation": 9}  # a square: no steps left over
    plain, checkpointed = (case.hypergradient(jax, 3, **options, checkpoint=c) for c in (False, True))
    for a, b in zip(plain[:4], checkpointed[:4], strict=True):
        assert relative_error(jax.to_numpy(b), jax.to_numpy(a)) <= 1e-13


def test_batches_may_differ_in_size_in_eager_frameworks():
    for name in ("numpy", "torch"):
        backend, case = framework(name), Quartic()
        X, y, S = case.batches[2]
        case.batches[2] = (X[:5], y[:5], S)
        hg = case.hypergradient(backend, 3, step_size=0.05)
        assert relative_error(backend.to_numpy(hg.grad), case.by_hand(3, step_size=0.05)[2]) <= 1e-12
