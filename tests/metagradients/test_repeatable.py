"""Batches and steps that differ when they are computed again."""

import numpy as np
import pytest
from cases import mover
from frameworks import framework
from linear_run import BATCHES, HPARAMS, TARGETS, Distance, Step, T, start

import bilevel as bl


def differentiate(backend, step=None, batches=None, **options):
    move = mover(backend, np.float64)
    hparams, target = move(HPARAMS, TARGETS[0])
    problem = bl.Training(step or Step(move), Distance())
    given = batches or list(move(*BATCHES))
    return bl.metagradient(problem, start(move), hparams, given, steps=T, outer_args=(target,), **options)


def test_batches_that_differ_are_found(backend):
    rng, calls = np.random.default_rng(0), []

    def batches(t):
        calls.append(t)
        return mover(backend, np.float64)(rng.standard_normal(1))[0]

    with pytest.raises(ValueError, match=r"batches: the batch of step 0 differs .* seeded .* checkpoints=\"none\""):
        differentiate(backend, batches=batches, checkpoints="all")
    calls.clear()
    differentiate(backend, batches=batches, checkpoints="none")
    assert calls == list(range(T))  # nothing is computed again


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_step_that_depends_on_more_than_its_arguments_is_found(name):
    backend = framework(name)

    class Drifting(Step):
        drift = 1.0

        def __call__(self, state, hparams, b):
            self.drift *= 1.1
            return super().__call__(state, hparams, b * self.drift)

    step = Drifting(mover(backend, np.float64))
    with pytest.raises(ValueError, match="step: its result differs when it is computed again with the same arguments"):
        differentiate(backend, step, checkpoints="sqrt")
    assert differentiate(backend, step, checkpoints="none").info.finite


def test_batches_may_hold_nan_and_text(backend):
    move = mover(backend, np.float64)

    class Named(Step):
        def __call__(self, state, hparams, b):
            return super().__call__(state, hparams, b["b"])

        def vjp_params(self, state, hparams, v, b):
            return super().vjp_params(state, hparams, v, b["b"])

        def vjp_hparams(self, state, hparams, v, b):
            return super().vjp_hparams(state, hparams, v, b["b"])

    batches = [{"b": b, "name": "train", "unused": move(np.full(2, np.nan))[0]} for b in move(*BATCHES)]
    found = differentiate(backend, Named(move), lambda t: dict(batches[t]), checkpoints="sqrt")
    expected = differentiate(backend, checkpoints="sqrt")
    np.testing.assert_allclose(backend.to_numpy(found.grad), backend.to_numpy(expected.grad), rtol=1e-12)
