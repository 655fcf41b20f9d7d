"""The benchmark of metagradients compares equal results."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmark's data are scikit-learn's")


def test_torch_columns_have_one_result(monkeypatch):
    pytest.importorskip("torch")
    from benchmarks.metagradients import torch_runs

    monkeypatch.setattr(torch_runs, "STEPS", 3)
    digits = torch_runs.Digits()
    expected = digits.by_hand()
    for checkpoints in ("none", "sqrt"):
        np.testing.assert_allclose(digits.ours(checkpoints=checkpoints), expected, rtol=1e-4, atol=1e-9)
    assert digits.ours(digits.each).shape == (20, torch_runs.TRAIN)
    np.testing.assert_allclose(digits.module(), expected, rtol=1e-4, atol=1e-9)
    results = [call() for call in torch_runs.maml(tasks=2).values()]
    for expected, found in (results[:2], results[2:]):  # functions of weights, and modules
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_jax_columns_have_one_result():
    pytest.importorskip("jax")
    from benchmarks.metagradients.jax_runs import Digits

    digits = Digits(4)
    expected = digits.by_hand("remat")
    np.testing.assert_allclose(digits.by_hand("nested"), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(digits.ours(checkpoints="sqrt"), expected, rtol=1e-4, atol=1e-9)
