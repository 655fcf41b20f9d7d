"""The report on metagradients: smooth and rough runs, low precision, and its text."""

import warnings

import numpy as np
import pytest
from cases import mover
from frameworks import framework
from linear_run import BATCHES, HPARAMS, TARGETS, Distance, Step, start, training

import bilevel as bl


def diagnose(backend, dtype=np.float64, outer=None, target=TARGETS[0], **options):
    move = mover(backend, dtype)
    hparams, target = move(HPARAMS, target)
    args = (training(move, outer), start(move), hparams, list(move(*BATCHES)))
    return bl.diagnose_training(*args, outer_args=(target,), **options)


def test_a_linear_run_agrees_and_is_smooth(backend):
    report = diagnose(backend)
    assert report.ok
    assert report.agreement == pytest.approx(1, abs=1e-9)  # central differences are exact for a quadratic F
    assert report.smoothness == pytest.approx(1)
    assert "no errors were found" in str(report)
    assert np.isnan(report.precision)
    assert report.obstacle == "the run is in float64"


def test_queries_are_compared_one_by_one(backend):
    report = diagnose(backend, target=TARGETS, directions=3)
    assert [c.predicted.shape for c in report.changes] == [(5,)] * 3
    for c in report.changes:
        np.testing.assert_allclose(c.predicted, c.actual, rtol=1e-9)


class Rough:
    """w ← 4 h w (1 − w), the logistic map, which is chaotic at h = 1."""

    def __call__(self, w, h, b):
        return 4 * h * w * (1 - w)

    def vjp_params(self, w, h, v, b):
        return 4 * h * (1 - 2 * w) * v

    def vjp_hparams(self, w, h, v, b):
        return 4 * w * (1 - w) * v


class Mean:
    """F = mean of w."""

    def __call__(self, w, h):
        return w.mean()

    def grad(self, w, h):
        return np.full_like(w, 1 / w.size), None


def logistic(backend, size=0.01, rate=0.96, steps=40):
    w, h = mover(backend, np.float64)(np.linspace(0.1, 0.9, 50), np.full(50, rate))
    return bl.diagnose_training(bl.Training(Rough(), Mean()), w, h, steps=steps, size=size)


def test_a_chaotic_run_is_found(backend):
    report = logistic(backend)
    names = [finding.name for finding in report.findings]
    assert names == ["not predictive", "rough", "growth"]
    text = str(report)
    assert "> agreement" in text
    assert "> growth" in text
    assert "smaller learning rate" in text
    assert logistic(backend, rate=0.5).ok


def test_findings_depend_on_the_size_of_the_change(backend):
    assert logistic(backend, steps=6, size=1e-4).agreement > 0.99
    assert logistic(backend, steps=6, size=0.03).agreement < 0.8


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_low_precision_is_found(name):
    backend = framework(name)
    step, dtype = _decays(name)
    first, hparams = (
        backend.from_numpy(a) for a in (np.linspace(0.5, 2, 40, dtype=np.float32), np.ones(40, np.float32))
    )
    problem = bl.Training(step, lambda w, h: (w**2).sum())
    single = bl.diagnose_training(problem, first, hparams, steps=30, size=0.01)
    assert single.precision > 0.9999
    assert single.ok
    low = bl.diagnose_training(problem, _cast(first, dtype), _cast(hparams, dtype), steps=30, size=0.05)
    assert low.precision < 0.99
    assert "precision" in [finding.name for finding in low.findings]
    assert "its agreement with float64" in str(low).replace("\n", " ")


def _decays(name):
    """Return a step with rounding errors that add up, and bfloat16."""
    if name == "torch":
        import torch

        return lambda w, h, b: w + (w * (1 - 0.01 * h * torch.sin(40 * w)) - w), torch.bfloat16
    import jax.numpy as jnp

    return lambda w, h, b: w + (w * (1 - 0.01 * h * jnp.sin(40 * w)) - w), jnp.bfloat16


def _cast(array, dtype):
    return array.to(dtype) if hasattr(array, "to") else array.astype(dtype)


def test_random_numbers_are_the_same_in_all_trainings():
    torch = pytest.importorskip("torch")
    framework("torch")

    def step(w, h, b):
        return w - 0.1 * (w - h) * torch.rand(3, dtype=w.dtype)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    args = bl.Training(step, lambda w, h: (w**2).sum()), torch.ones(3).double(), torch.ones(3).double()
    assert bl.diagnose_training(*args, steps=9).agreement == pytest.approx(1, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_derivative_that_is_not_finite_is_found(backend):
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        report = logistic(backend, rate=30.0)
    assert [finding.name for finding in report.findings] == ["not finite"]
    assert "bl.metagradient raises an error" in str(report)


def test_a_problem_is_no_training():
    with pytest.raises(TypeError, match=r"^training: expected bl\.Training\(step, outer\), got Problem"):
        bl.diagnose_training(bl.problems.ridge(), np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "size: expected a number > 0, got 0"),
        ({"size": "big"}, TypeError, "size: expected a number > 0, got 'big'"),
        ({"directions": 0}, ValueError, "directions: expected an integer >= 1, got 0"),
        ({"directions": 1.5}, TypeError, "directions: expected an integer >= 1, got 1.5"),
        ({"precision_steps": -1}, ValueError, "precision_steps: expected an integer >= 0, got -1"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        diagnose(framework("numpy"), **options)


def test_hparams_are_needed():
    training = bl.Training(min, max)
    with pytest.raises(ValueError, match="hparams is None, but diagnose_training changes hparams"):
        bl.diagnose_training(training, np.zeros(2), None, [1.0])


def test_several_states_are_compared(backend):
    move = mover(backend, np.float64)

    class Last:
        def __call__(self, states, h, t):
            return Distance()(states[-1], h, t)

        def grad(self, states, h, t):
            grad, direct = Distance().grad(states[-1], h, t)
            zero = {name: np.zeros_like(a) for name, a in grad.items()}
            return [zero] * (len(states) - 1) + [grad], direct

    hparams, target = move(HPARAMS, TARGETS[0])
    problem = bl.Training(Step(move), Last(), at=(3, 13))
    report = bl.diagnose_training(problem, start(move), hparams, list(move(*BATCHES)), outer_args=(target,))
    assert report.agreement == pytest.approx(1, abs=1e-9)


class Power:
    """w ← h w, and nan for h above a limit."""

    def __init__(self, limit=np.inf):
        self.limit = limit

    def __call__(self, w, h, b):
        return w * h * (1.0 if float(h.max()) < self.limit else np.nan)

    def vjp_params(self, w, h, v, b):
        return v * h

    def vjp_hparams(self, w, h, v, b):
        return v * w


def test_a_run_that_diverges_for_the_changes_is_found():
    report = bl.diagnose_training(bl.Training(Power(limit=1.1), Mean()), np.ones(3), np.ones(3), steps=4)
    assert [finding.name for finding in report.findings] == ["not predictive"]
    assert "The run diverges where λ changes by 0.2" in str(report)
    assert bl.diagnose_training(bl.Training(Power(), Mean()), np.ones(3), np.ones(3), steps=2).ok


def test_changes_that_are_zero_agree():
    report = bl.diagnose_training(bl.Training(Power(), Mean()), np.zeros(3), np.ones(3), steps=4)
    assert report.agreement == 1
    assert report.ok


def test_several_states_and_many_leaves_are_compared_in_low_precision():
    torch = pytest.importorskip("torch")
    framework("torch")

    def step(w, h, b):
        return w - h["rate"] * h["weights"].mean() * (w - h["shift"]) - h["none"].sum()

    hparams = {
        "rate": torch.tensor(0.1),
        "weights": torch.ones(5),
        "shift": torch.zeros(3),
        "none": torch.zeros(0),
    }
    problem = bl.Training(step, lambda states, h: sum((w**2).sum() for w in states), at=range(1, 26))
    report = bl.diagnose_training(problem, torch.ones(3), hparams, steps=30, size=0.01)
    assert report.precision == pytest.approx(1, abs=1e-5)
    assert report.growth > 10  # because F sums over 25 states
    assert report.ok


def test_precision_compares_lengths_too():
    torch = pytest.importorskip("torch")
    framework("torch")

    def step(w, h, b):
        return w * h if w.dtype == torch.float64 else w * h * 0.5

    report = bl.diagnose_training(
        bl.Training(step, lambda w, h: w.sum()), torch.ones(2), torch.tensor(1.0), steps=1, size=0.01
    )
    assert report.precision == pytest.approx(2 * 0.5 / (1 + 0.25))
