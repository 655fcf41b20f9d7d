"""The main job: its parts on small instances, and one run from end to end."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dense import by_jax, by_torch
from frameworks import framework, relative_error

import bilevel as bl

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from bilevel.demo import data, demo, picture, report
from bilevel.demo.models import mlp, softmax_regression
from bilevel.demo.search import Outcome, Run, Score, Task

NETWORK_FRAMEWORKS = ["torch", "jax"]


@pytest.fixture(scope="module")
def digits():
    return data.load(seed=0)


def short(model):
    """Fewer steps and fewer penalties to try, none of them so small that a fit takes long."""
    return replace(model, maxiter=2, grid=np.logspace(-3, -1, 4))


class TestData:
    def test_three_parts_share_no_image_and_lose_none(self, digits):
        assert [part.X.shape for part in digits] == [(300, 64), (700, 64), (797, 64)]
        from sklearn.datasets import load_digits

        X = np.concatenate([part.X for part in digits]) * 16
        np.testing.assert_array_equal(np.unique(X, axis=0), np.unique(load_digits().data, axis=0))

    def test_a_seed_fixes_the_split_and_another_changes_it(self, digits):
        np.testing.assert_array_equal(data.load(0).train.y, digits.train.y)
        assert (data.load(1).train.y != digits.train.y).any()

    def test_halving_averages_two_by_two_pixels(self, digits):
        image = digits.test.X[5].reshape(8, 8)
        half = data.halve(digits).test.X[5].reshape(4, 4)
        assert half[1, 2] == pytest.approx(image[2:4, 4:6].mean())
        assert half.mean() == pytest.approx(image.mean())


class TestModels:
    def test_the_network_is_the_same_in_torch_and_jax(self, digits):
        values = []
        for name in NETWORK_FRAMEWORKS:
            task = Task(mlp(hidden=5), data.halve(digits), framework(name), seed=0)
            loss = task.model.problem.inner(task.params0, task.shared(0.1), *task.train)
            values.append(task.backend.to_host(loss))
        assert values[0] == pytest.approx(values[1], rel=1e-5)

    def test_the_networks_penalty_is_half_the_weighted_square(self):
        backend = framework("torch")
        digits = data.Digits(*[data.Part(np.zeros((2, 4)), np.array([0, 1]))] * 3)
        task = Task(mlp(hidden=3), digits, backend, seed=0)
        loss, penalized = (
            backend.to_host(f(task.params0, task.shared(0.2), *task.train))
            for f in (task.model.problem.outer, task.model.problem.inner)
        )
        squares = backend.to_host(backend.space(task.params0).norm(task.params0)) ** 2
        assert penalized - loss == pytest.approx(0.1 * squares, rel=1e-4)
        assert loss == pytest.approx(np.log(10), rel=1e-5)  # no pixels, no preference

    @pytest.mark.parametrize("name", ["numpy", *NETWORK_FRAMEWORKS])
    def test_hypergradients_agree_with_the_dense_hessian(self, digits, name):
        model = softmax_regression() if name == "numpy" else mlp(hidden=4)
        task = Task(model, data.halve(digits), framework(name), seed=0)
        errors = task.errors(model.solver)
        assert errors[0] <= (1e-4 if name == "numpy" else 5e-3)
        assert len(errors) == (1 if name == "numpy" else 2)

    @pytest.mark.parametrize("name", NETWORK_FRAMEWORKS)
    def test_the_second_error_is_that_of_the_damping(self, digits, name):
        task = Task(model := mlp(hidden=4), data.halve(digits), framework(name), seed=0)
        hparams = task.shared(model.start)
        params = task.fit(hparams, task.params0)

        def dense(damping):
            if name == "jax":
                losses = (
                    lambda w, h: model.problem.inner(w, h, *task.train),
                    lambda w, h: model.problem.outer(w, h, *task.validation),
                )
                return by_jax(*losses, params, hparams, damping)
            for tensor in [*params.values(), *hparams.values()]:
                tensor.requires_grad_()
            losses = (
                model.problem.inner(params, hparams, *task.train),
                model.problem.outer(params, hparams, *task.validation),
            )
            return by_torch(*losses, params.values(), hparams.values(), damping)

        damped, exact = dense(model.solver.damping), dense(0.0)
        expected = np.linalg.norm(damped - exact) / np.linalg.norm(exact)
        assert expected > 0.01
        assert task.errors(model.solver)[1] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORK_FRAMEWORKS)
def test_tuning_a_small_network_lowers_the_validation_loss(digits, name):
    model = short(mlp(hidden=4))
    task = Task(model, data.halve(digits), framework(name), seed=0)
    outcome = task.tune(model.solver)
    assert outcome.scores[-1].validation_loss < outcome.scores[0].validation_loss
    assert outcome.hyperparameters == 16 * 4 + 4 + 4 * 10 + 10 == task.size
    assert outcome.pixel_penalties.shape == (16, 4)
    low, high = model.bounds
    assert (outcome.pixel_penalties >= low * 0.999).all()
    assert (outcome.pixel_penalties <= high * 1.001).all()
    assert outcome.steps > 0


def test_the_grid_search_finds_the_best_shared_penalty(digits):
    model = short(softmax_regression())
    task = Task(model, data.halve(digits), framework("numpy"), seed=0)
    outcome = task.tune(model.solver)
    losses = []
    for penalty in model.grid:
        hparams = np.full((17, 10), np.log(penalty))
        losses.append(model.problem.outer(task.fit(hparams, task.params0), hparams, *task.validation))
    assert outcome.shared.validation_loss == pytest.approx(min(losses), rel=1e-6)
    assert outcome.shared_penalty == model.grid[np.argmin(losses)]
    assert relative_error(task.shared(0.1), np.full((17, 10), np.log(0.1))) <= 1e-12


def outcome(shared, *tuned):
    scores = [Score(validation, 0.9, test, 0.9) for validation, test in tuned]
    return Outcome(scores, Score(*shared[:1], 0.9, shared[1], 0.9), 0.01, np.ones((64, 3)), 650, 7, 0, 123)


class TestReport:
    def test_better_on_test(self):
        text = report.verdict(outcome((0.2, 0.2), (0.5, 0.5), (0.1, 0.15)))
        assert text == "  On test, the loss is 25% lower than with the best shared penalty."

    def test_overfitting_is_said(self):
        text = report.verdict(outcome((0.2, 0.2), (0.5, 0.5), (0.3, 0.18), (0.1, 0.3)))
        assert "50% higher than with the best shared penalty: the tuned penalties overfit" in text
        assert "It was lowest, 0.1800, after step 1" in text

    def test_about_the_same(self):
        assert "is about the same as with the best" in report.verdict(outcome((0.2, 0.2), (0.1, 0.201)))

    def test_a_search_that_ended_early_is_not_called_overfitting(self):
        text = report.verdict(outcome((0.2, 0.2), (0.5, 0.5), (0.4, 0.4)))
        assert "ended before it reached the best shared penalty" in text
        assert "overfit" not in text

    def test_the_columns_line_up(self):
        lines = report.table([("one", Score(0.5, 1.0, 12.25, 0.05)), ("two", Score(12.25, 0.05, 0.5, 1.0))]).split("\n")
        ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in lines]
        assert ends[1] == ends[2][1:] == ends[3][1:]
        assert ends[0][1:] == ends[1][1::2]

    def test_a_damped_solver_shows_both_errors(self):
        assert "without it, the error is 3.0e-01" in report.facts(outcome((1, 1), (1, 1)), 10, [1e-5, 0.3], 1.0)
        assert "without it" not in report.facts(outcome((1, 1), (1, 1)), 10, [1e-5], 1.0)

    def test_a_summary_of_several_runs(self):
        runs = [Run(name, outcome((0.2, 0.3), (0.1, 0.25)), 12.4, Path()) for name in ("numpy", "torch")]
        lines = report.summary(runs).split("\n")
        assert lines[2].split() == ["torch", "650", "0.3000", "0.2500", "90.0%", "90.0%", "12", "s"]
        assert lines[3].split() == ["all", "25", "s"]
        assert len({len(line) for line in lines}) == 1


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "picture.png"
    picture.save(outcome((0.2, 0.2), (0.5, 0.5), (0.1, 0.15)), "A title", path)
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[:2] == (504, 1200)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100


@pytest.mark.slow
def test_a_run_from_end_to_end(capsys, tmp_path):
    run = demo("numpy", out=tmp_path / "made" / "for it")
    path = run.picture
    assert path == tmp_path / "made" / "for it" / "bilevel-demo-numpy.png"
    assert path.stat().st_size > 10_000
    out, err = capsys.readouterr()
    assert err == ""
    assert "warning" not in out
    rows = re.findall(
        r"^  (start|best shared|tuned): .*?(\d\.\d+) +(\d+\.\d)% +(\d\.\d+) +(\d+\.\d)%$", out, re.MULTILINE
    )
    losses = {row[0]: (float(row[1]), float(row[3])) for row in rows}
    assert losses["tuned"][0] < 0.5 * losses["best shared"][0]  # on validation
    assert losses["tuned"][1] < 0.95 * losses["best shared"][1]  # on test
    assert re.search(r"hyperparameters +650$", out, re.MULTILINE)
    assert float(re.search(r"hypergradient's error +(\S+),", out)[1]) < 1e-4
    assert str(path) in out


def test_a_solver_that_fails_is_reported_and_not_repeated(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bilevel.demo.softmax_regression", lambda: short(softmax_regression()))
    demo("numpy", bl.CG(maxiter=2), out=tmp_path)
    out = capsys.readouterr().out
    failed = re.search(r"^(\d+) of the (\d+) hypergradients did not converge\.$", out, re.MULTILINE)
    assert 1 <= int(failed[1]) <= int(failed[2])
    assert 1 <= out.count("warning: CG: stopped after 2 steps") <= 2
