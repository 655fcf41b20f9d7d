"""The learned magnitudes of deformations."""

import sys

import numpy as np
import pytest
from frameworks import relative_error
from paper_systems import check_augmentation, check_stored, paper, report_of
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def warp(**magnitudes):
    """Return a warp with these magnitudes, and zero for the others."""
    models = paper("models")
    values = [magnitudes.get(name, 0.0) for name in models.MAGNITUDES]
    made = models.Warp(values).double().requires_grad_(False)
    made.logs.copy_(torch.tensor(values, dtype=torch.float64).log())  # to all digits
    return made


def noise(**numbers):
    """Return the noise of one image: by default zero."""
    row = torch.zeros(1, warp().noise(1).shape[1], dtype=torch.float64)
    for name, number in numbers.items():
        row[0, paper("models").MAGNITUDES.index(name)] = number
    return row


class TestWarp:
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def test_magnitudes_of_zero_leave_images_as_they_are(self):
        torch.testing.assert_close(warp()(self.x, warp().noise(1).double()), self.x)

    def test_a_translation_by_a_quarter_moves_two_of_eight_pixels(self):
        moved = warp(right=0.5)(self.x, noise(right=1.0))
        torch.testing.assert_close(moved[..., :-2], self.x[..., 2:])
        assert moved[..., -2:].abs().max() < 1e-12

    def test_a_rotation_is_scipys(self):
        turned = warp(rotation=0.4)(self.x, noise(rotation=0.5))[0, 0]
        expected = ndimage.rotate(self.x[0, 0].numpy(), np.degrees(0.2), reshape=False, order=1)
        assert relative_error(turned[2:-2, 2:-2], expected[2:-2, 2:-2]) < 1e-6

    def test_elastic_displacements_vary_within_an_image(self):
        draws = warp().noise(1).double()
        draws[:, :6] = 0
        moved = warp(elastic=0.2)(self.x, draws)
        assert relative_error(moved, self.x) > 0.1
        draws[:, 6:22], draws[:, 22:] = 1.0, 0.0  # the same displacement everywhere is a translation to the right
        torch.testing.assert_close(warp(elastic=0.5)(self.x, draws), warp(right=0.5)(self.x, noise(right=1.0)))

    def test_hypergradient_agrees_with_the_exact_one(self):
        torch.manual_seed(0)
        augment = paper("models").Warp([0.1] * 7).double()
        check_augmentation(augment, augment.noise(12).double())


def test_only_hypergradients_change_the_magnitudes(system, histories):
    names = paper("models").MAGNITUDES
    ends = {name: [history["result"][key] for key in names] for name, history in histories.items()}
    for prefix, task in system.TASKS.items():
        assert ends[f"{prefix}none-0"] == [0.0] * len(names)
        assert ends[f"{prefix}hand-0"] == pytest.approx(task.hand)
        for variant in set(task.variants) & set(system.SOLVERS):
            assert (np.abs(np.log(ends[f"{prefix}{variant}-0"]) - np.log(task.start)) > 0.1).all()


@pytest.mark.parametrize("variant", ["random", "metagradient"])
def test_several_trainings_keep_the_one_of_the_lowest_validation_loss(histories, variant):
    history = histories[f"{variant}-0"]
    best = min(history["rows"], key=lambda row: row["val_loss"])
    assert history["result"]["test_accuracy"] == best["test_accuracy"]
    assert len(history["rows"]) == 2
    assert history["rows"][0]["rotation"] != history["rows"][1]["rotation"]


class TestMetagradient:
    """The derivative of a training of four steps, in float64."""

    logs = torch.full((7,), 0.1, dtype=torch.float64).log()

    @pytest.fixture(autouse=True)
    def double(self, monkeypatch):
        small_cnn = paper("models").small_cnn
        monkeypatch.setattr(paper("magnitudes"), "small_cnn", lambda *size: small_cnn(*size).double())
        noise = paper("models").Warp.noise
        monkeypatch.setattr(paper("models").Warp, "noise", lambda self, images: noise(self, images).double())

    @staticmethod
    def differentiated(logs, decay=0.1):
        """Return the validation loss after a training with these log magnitudes, and its derivative."""
        torch.manual_seed(0)
        augmentation = paper("augmentation")
        sizes = augmentation.Sizes(train=30, validation=40, batch=10, steps=4, decay=decay)
        parts = augmentation.Parts.of(paper("data").mnist(None), sizes)
        parts = augmentation.Parts(*(part._replace(x=part.x.double()) for part in parts))
        augment = paper("models").Warp(logs.exp().tolist())
        augment.logs.data = logs
        model, derivative = paper("magnitudes").differentiated(augment, parts, sizes)
        return augmentation.evaluate(model, *parts.val)[0], derivative

    def test_it_agrees_with_differences(self):
        _, derivative = self.differentiated(self.logs)
        eps = 1e-6
        for i in (0, 3, 6):
            change = eps * torch.eye(7, dtype=torch.float64)[i]
            high, low = (self.differentiated(self.logs + sign * change)[0] for sign in (1, -1))
            assert derivative[i].item() == pytest.approx((high - low) / (2 * eps), rel=1e-4)

    def test_the_training_has_weight_decay(self):
        without, with_decay = (self.differentiated(self.logs, decay)[0] for decay in (0.0, 0.5))
        assert abs(without - with_decay) > 1e-3


class TestOptuna:
    def test_its_search_keeps_magnitudes_in_their_range(self, system, command):
        pytest.importorskip("optuna")
        (history,) = system.main([*command, "--only", "optuna"]).values()
        least, most = history["settings"]["least"], history["settings"]["most"]
        assert len(history["rows"]) == 2
        assert all(least <= row[name] <= most for row in history["rows"] for name in paper("models").MAGNITUDES)

    def test_without_it_its_variant_is_left_out(self, system, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "optuna", None)
        monkeypatch.setitem(system.TASKS, "", system.TASKS[""]._replace(variants=("none", "optuna")))
        command = ["--fast", "--out", str(tmp_path)]
        with pytest.raises(SystemExit, match=r"optuna-0: this variant needs Optuna\. Run pip install optuna"):
            system.main([*command, "--only", "optuna"])
        monkeypatch.setattr(system, "TASKS", {"": system.TASKS[""]})
        assert list(system.main(command)) == ["none-0"]
        assert "optuna-0 is left out" in capsys.readouterr().out


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_tables_and_a_picture(system, histories, tmp_path):
    again = sum("again_test_accuracy" in history["result"] for history in histories.values())
    lines = 1 + 2 * len(system.TASKS) + len(histories) + again
    assert report_of(system, histories, tmp_path).count("\n| ") + 1 == lines


class TestReport:
    """Made histories with known answers."""

    @staticmethod
    def line(*accuracies, cost=1.0):
        results = [{"test_accuracy": accuracy} for accuracy in accuracies]
        return paper("report.magnitude_table").Line("cg", "CG", results, [cost] * len(results))

    def test_the_search_in_the_same_time_has_the_trainings_that_begin_in_it(self):
        rows = [{"val_loss": loss} for loss in (0.5, 0.4, 0.6, 0.1)]
        search_of = paper("report.magnitude_table").search_of
        for cost, loss in ((0.5, 0.5), (1.01, 0.4), (3.0, 0.4), (9.0, 0.1)):
            assert search_of({"rows": rows}, cost)["val_loss"] == loss

    def test_gains_are_paired_by_seed(self):
        gains = paper("report.magnitude_table").gains(self.line(0.9, 0.85), self.line(0.7, 0.8, 0.1))
        assert gains == pytest.approx([20, 5])

    def test_a_search_is_compared_in_the_time_of_each_seed(self):
        rows = [{"val_loss": 0.5, "test_accuracy": 0.6}, {"val_loss": 0.4, "test_accuracy": 0.7}]
        ahead = paper("report.magnitude_table").ahead
        assert ahead(self.line(0.9, 0.8), [{"rows": rows}] * 2) == pytest.approx([30, 20])
        assert ahead(self.line(0.9, 0.8, cost=1.1), [{"rows": rows}] * 2) == pytest.approx([20, 10])

    def test_costs_are_in_trainings_of_the_same_seed(self):
        def history(seconds, *rows):
            return {"cpu_seconds": seconds, "rows": [{"cpu_seconds": row} for row in rows]}

        runs = {"none": [history(4), history(8)], "hand": [history(5), history(8)], "cg": [history(10), history(24)]}
        runs |= {"random": [history(12, 5, 7, 4), history(24, 8, 8, 8)], "metagradient": [history(30, 20, 10)]}
        costs = {"none": [1, 1], "random": [3, 3], "cg": [2, 3], "metagradient": [3]}
        for variant, expected in costs.items():
            assert paper("report.magnitude_table").costs_of(variant, runs) == pytest.approx(expected)
