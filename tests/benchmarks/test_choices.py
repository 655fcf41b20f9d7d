"""The benchmark of settings finds wrong labels, and counts what it says."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow


def test_a_run_finds_wrong_labels_and_counts_solves(monkeypatch):
    from benchmarks import choices

    monkeypatch.setattr(choices, "STEPS", 100)
    tuned = choices.run(replace(choices.BASE, rate=1.0), seed=0)
    equal = choices.run(None, seed=0)
    assert tuned.f1 > 0.8
    assert tuned.test > equal.test + 0.02
    assert sum(tuned.statuses.values()) == 10
    assert (equal.f1, equal.steps, equal.statuses) == (0, 0, {})


def test_a_solver_without_damping_fails_in_training_and_a_budget_does_not(monkeypatch):
    from benchmarks import choices

    monkeypatch.setattr(choices, "STEPS", 30)
    undamped = choices.run(choices.CHOICES["damping 0.0"], seed=0).statuses
    assert undamped["NEGATIVE_CURVATURE"] > 0
    assert choices.run(choices.CHOICES["2 steps of CG, warm"], seed=0).statuses == {"MAXITER": 3}
