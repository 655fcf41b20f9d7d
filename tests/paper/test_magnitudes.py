"""The learned magnitudes of deformations."""

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


def test_random_search_keeps_its_best_training(histories):
    history = histories["random-0"]
    best = min(history["rows"], key=lambda row: row["val_loss"])
    assert history["result"]["test_accuracy"] == best["test_accuracy"]
    assert len(history["rows"]) == 2


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_tables_and_a_picture(system, histories, tmp_path):
    compared = 3 + 2  # each has a row along the training and one trained again
    assert report_of(system, histories, tmp_path).count("\n| ") == (2 * 2 + len(histories)) + (2 * 2 + 2 * compared)


class TestReport:
    """Made histories with known answers."""

    @staticmethod
    def history(accuracy, again=0.0, seconds=10.0, **more):
        result = {"test_accuracy": accuracy, "again_test_accuracy": again, "val_loss": 1 - accuracy}
        return {"result": result, "cpu_seconds": seconds, "rows": [], **more}

    def test_the_search_in_the_same_time_has_as_many_trainings_as_begin_in_it(self):
        rows = [{"val_loss": loss, "cpu_seconds": 10.0} for loss in (0.5, 0.4, 0.6, 0.1)]
        search_of = paper("report.magnitudes").search_of
        for seconds, trials, loss in ((5.0, 1, 0.5), (10.1, 2, 0.4), (30.0, 3, 0.4), (90.0, 4, 0.1)):
            found = search_of({"rows": rows}, seconds)
            assert (found["trials"], found["result"]["val_loss"]) == (trials, loss)

    def test_gains_are_paired_by_seed(self):
        none, tuned = [[self.history(a) for a in pair] for pair in ((0.7, 0.8), (0.9, 0.85))]
        assert paper("report.magnitudes").gains(tuned, none) == pytest.approx([20, 5])
