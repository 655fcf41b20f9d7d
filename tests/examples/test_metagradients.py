"""The examples of metagradients: their derivatives, and small versions of their results."""

import math

import numpy as np
import pytest
from frameworks import example, relative_error

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import bilevel as bl

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMAML:
    maml = example("pytorch/maml.py")

    def test_the_gradient_equals_the_gradient_of_a_loop_by_hand(self):
        method = self.maml.MAML(0, learn_rates=True)
        (x, y), query = self.maml.wave(torch.Generator().manual_seed(0))
        mse_loss(functional_call(method.net, method.adapt((x, y)), (query[0],)), query[1]).backward()

        weights, rates = dict(method.net.named_parameters()), method.log_rates.exp()
        for _ in range(method.steps):
            loss = mse_loss(functional_call(method.net, weights, (x,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            pairs = zip(weights.items(), rates, grads, strict=True)
            weights = {name: w - rate * g for (name, w), rate, g in pairs}
        loss = mse_loss(functional_call(method.net, weights, (query[0],)), query[1])
        for parameter, expected in zip(
            method.parameters(), torch.autograd.grad(loss, method.parameters()), strict=True
        ):
            assert relative_error(parameter.grad, expected) < 1e-4

    def test_the_gradient_of_imaml_solves_with_the_dense_hessian(self, monkeypatch):
        monkeypatch.setattr(
            self.maml, "network", lambda: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        )
        method = self.maml.ImplicitMAML(0)
        support, (x, y) = ([a.double() for a in points] for points in self.maml.wave(torch.Generator().manual_seed(1)))
        adapted = method.adapt(support, steps=200)
        mse_loss(functional_call(method.net, adapted, (x,)), y).backward()

        names, shapes = list(adapted), [w.shape for w in adapted.values()]
        sizes = [shape.numel() for shape in shapes]

        def tree(flat):
            return {n: a.view(s) for n, a, s in zip(names, flat.split(sizes), shapes, strict=True)}

        w = torch.cat([a.detach().ravel() for a in adapted.values()])
        hessian = torch.autograd.functional.hessian(
            lambda w: mse_loss(functional_call(method.net, tree(w), (support[0],)), support[1]), w
        )
        w.requires_grad_()
        c = torch.autograd.grad(mse_loss(functional_call(method.net, tree(w), (x,)), y), w)[0]
        expected = torch.linalg.solve(torch.eye(len(w)) + hessian / self.maml.NEARNESS, c)
        assert relative_error(torch.cat([p.grad.ravel() for p in method.parameters()]), expected) < 0.05
        assert relative_error(c, expected) > 0.5  # the solve matters

    @pytest.mark.slow
    def test_few_steps_fit_new_waves(self, tmp_path, capsys):
        found = self.maml.main(["--iterations", "60", "--figure", str(tmp_path / "maml.png")])
        assert found["MAML"][-1] == found["MAML"][3] < 0.6 * found["MAML"][0]
        assert found["Meta-SGD"][-1] < 0.6 * found["random weights"][-1]
        assert found["iMAML"][-1] < 0.8 * found["iMAML"][0]
        assert "rates of Meta-SGD" in capsys.readouterr().out
        assert (tmp_path / "maml.png").stat().st_size > 0


class TestDataSelection:
    @pytest.fixture
    def selection(self, monkeypatch):
        module = example("pytorch/data_selection.py")
        monkeypatch.setattr(module, "EPOCHS", 3)
        return module

    def test_all_wrong_labels_are_listed(self, selection):
        clean, data = (self.labelled(selection, part) for part in (0.0, 0.3))
        assert torch.equal(clean.train[1] != data.train[1], data.wrong)
        assert 0.2 < data.wrong.float().mean() < 0.4

    @staticmethod
    def labelled(selection, part):
        selection.WRONG = part
        return selection.read(None, 200)

    def test_scores_are_derivatives_of_the_losses_of_queries(self, selection):
        run = selection.Run(selection.read(None, 80), 0)
        scores = run.metagradients()
        for i in (0, 40):
            moved = [run.ones.clone() for _ in range(2)]
            moved[0][i] -= 0.05
            moved[1][i] += 0.05
            before, after = (run.each(run.train(weights), weights).detach() for weights in moved)
            assert relative_error(scores[:, i], (after - before) / 0.1) < 0.01

    def test_products_of_gradients(self, selection):
        run = selection.Run(selection.read(None, 50), 0)
        state = run.train(run.ones)
        weights = {name: w.clone().requires_grad_() for name, w in state.params.items()}

        def gradient(images, i):
            x, y = images
            loss = nn.functional.cross_entropy(functional_call(run.net, weights, (x[i : i + 1],)), y[i : i + 1])
            return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(weights.values()))])

        expected = -gradient(run.data.queries, 3) @ gradient(run.data.train, 7) / 50
        assert run.products()[3, 7] == pytest.approx(float(expected), rel=1e-4)

    def test_the_score_of_right_predictions_is_one(self, selection):
        run = selection.Run(selection.read(None, 40), 0)
        run.each = lambda state, weights: torch.stack([weights[:20].sum(), -weights[:20].sum()])
        run.train = lambda weights: None
        right = torch.zeros(2, 40)
        right[0, :20], right[1, :20] = 1.0, -1.0
        found = selection.datamodeling_score(run, {"right": right, "wrong": -right}, 12)
        assert found == pytest.approx({"right": 1.0, "wrong": -1.0})

    @pytest.mark.slow
    def test_training_without_harmful_examples_is_better(self, tmp_path, capsys):
        found = example("pytorch/data_selection.py").main(["--trainings", "8", "--figure", str(tmp_path / "a.png")])
        assert found["lds"]["metagradients"] > 0.85 > 0.5 > found["lds"]["products of gradients"]
        accuracy = found["accuracy"]
        assert accuracy["metagradients"][1] > accuracy["metagradients"][0] + 0.015
        assert accuracy["metagradients"][2] > max(accuracy["random"][2], accuracy["products of gradients"][2]) + 0.02
        assert found["wrong"]["metagradients"] > 0.65
        assert "accuracy without" in capsys.readouterr().out
        assert (tmp_path / "a.png").stat().st_size > 0


class TestLearningRateSchedule:
    schedule = example("pytorch/learning_rate_schedule.py")

    @pytest.fixture
    def task(self):
        return self.schedule.Task(self.schedule.read(None)[1], 6, 0)

    def test_rates_lie_between_the_points(self, task):
        hparams = self.schedule.constant(1e-3)
        hparams["log_rates"][1] = torch.arange(6.0)
        found = [task.options(hparams, t, {"index": 1})["lr"].log() for t in range(6)]
        assert found == pytest.approx(list(range(6)), abs=1e-5)
        hparams["log_rates"] = torch.tensor([[0.0, 10.0]] * 2)
        found = [float(task.options(hparams, t, {"index": 0})["lr"].log()) for t in range(6)]
        assert found == pytest.approx([0, 2, 4, 6, 8, 10], abs=1e-5)
        assert task.options(self.schedule.constant(1e-3, points=1), 5, {"index": 0})["lr"] == pytest.approx(1e-3)

    def test_every_weight_is_in_one_group(self, task):
        groups = [group["params"] for group in task.step.optimizer.param_groups]
        weights = [id(w) for group in groups for w in group]
        assert sorted(weights) == sorted(id(w) for w in task.step.model.parameters())
        assert [len(w) for w in groups[0]] == [48, 48]  # the last layer has an output for each character

    def test_the_derivative_of_a_run_equals_a_central_difference(self, task):
        hparams = self.schedule.constant(1e-2)
        hg = bl.metagradient(task.training, task.first, hparams, task.batches)
        for name, place in (("log_rates", (0, 0)), ("log_rates", (1, 3)), ("log_decays", (1,))):
            values = []
            for sign in (-1, 1):
                moved = {key: value.clone() for key, value in hparams.items()}
                moved[name][place] += sign * 0.1
                values.append(task.value(task.train(moved)))
            assert float(hg.grad[name][place]) == pytest.approx((values[1] - values[0]) / 0.2, rel=0.05, abs=1e-5)

    def test_the_first_change_of_metagradient_descent_is_better(self, task):
        trials = self.schedule.metagradient_descent(task, torch.Generator())
        values = [task.value(next(trials).state) for _ in range(5)]
        assert values[4] < min(values[:4])

    def test_a_run_that_diverges_is_the_worst(self, task):
        assert task.value(task.train(self.schedule.constant(float("inf")))) == math.inf

    def test_all_methods_start_with_the_same_trials_and_keep_the_best(self, tmp_path, capsys):
        path = tmp_path / "rates.png"
        found = self.schedule.main(["--steps", "6", "--seconds", "0.1", "--figure", str(path)])
        assert list(found) == ["metagradient descent", "random search", "greedy"]
        assert len({search.losses[0] for [search] in found.values()}) == 1
        for [search] in found.values():
            assert search.trials >= 6
            assert (np.diff(search.losses) < 0).all()
            assert (np.diff(search.times) > 0).all()
        assert "random search" in capsys.readouterr().out
        assert path.stat().st_size > 0

    def test_the_text_of_a_folder(self, tmp_path):
        (tmp_path / "wikitext2_validtest").mkdir()
        (tmp_path / "wikitext2_validtest" / "valid.txt").write_text("aab" * 20)
        name, windows = self.schedule.read(tmp_path)
        assert name == "WikiText-2"
        assert windows[0, :6].tolist() == [1, 1, 2, 1, 1, 2]
