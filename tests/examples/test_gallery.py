"""The gallery: its models are right, and tuning by hypergradients is better than the plain way."""

import numpy as np
import pytest
from frameworks import example, relative_error

import bilevel as bl

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs a script with --fast. The script prints all of its results, and draws a picture."""

    def run(script):
        found = script.main(["--fast", "--figure", str(tmp_path / "a.png")])
        printed = capsys.readouterr().out
        assert all(name in printed for name in found)
        assert (tmp_path / "a.png").stat().st_size > 0
        return found

    return run


@pytest.fixture(scope="module")
def deconvolution():
    pytest.importorskip("torch")
    return example("gallery/deconvolution.py")


class TestDeconvolution:
    def test_the_blur_is_scipys(self, deconvolution):
        from scipy import ndimage

        x, _ = deconvolution.pairs(0)
        expected = ndimage.gaussian_filter(x[0, 0].numpy(), deconvolution.BLUR, mode="constant", radius=4)
        assert relative_error(deconvolution.blur(x[:1])[0, 0], expected) < 1e-12

    def test_tikhonovs_images_solve_the_normal_equations(self, deconvolution):
        import torch

        _, y = deconvolution.pairs(0)
        y, hparams = (
            y[:1, :, :9, :9],
            {"filters": deconvolution.differences(), "logs": torch.tensor([-3.0, -2.0]).double()},
        )
        basis = torch.eye(81, dtype=torch.float64).view(81, 1, 9, 9)
        A = deconvolution.blur(basis).flatten(1).T
        D = torch.nn.functional.conv2d(basis, hparams["filters"][:, None], padding=1).transpose(0, 1).flatten(2)
        matrix = A.T @ A + sum(weight * d @ d.T for weight, d in zip(hparams["logs"].exp(), D, strict=True))
        expected = torch.linalg.solve(matrix, A.T @ y.flatten())
        found = deconvolution.recover(deconvolution.problem_of(deconvolution.square), hparams, y)
        assert relative_error(found.flatten(), expected) < 1e-3

    def test_cosines_are_orthonormal_and_ignore_the_mean(self, deconvolution):
        filters = deconvolution.cosines().flatten(1)
        np.testing.assert_allclose(filters @ filters.T, np.eye(8), atol=1e-12)
        np.testing.assert_allclose(filters.sum(1), 0, atol=1e-12)

    @pytest.mark.slow
    def test_learned_filters_recover_test_images_better(self, deconvolution, run):
        found = run(deconvolution)
        assert found["learned filters"]["test"] > found["total variation, grid search"]["test"] + 0.2
        assert found["learned filters"]["test"] > found["Tikhonov, grid search"]["test"] + 0.2


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("torch")
    return example("gallery/kernel.py")


class TestKernel:
    def test_with_all_rows_as_centers_it_is_kernel_ridge_regression(self, kernel):
        """On small targets, the Huber loss is the squared one."""
        import torch
        from sklearn.kernel_ridge import KernelRidge

        x, y, x_test, _ = kernel.make(40, 0.0, 0)
        y = y / (10 * y.abs().max())
        process = kernel.Process(x)
        hparams = {"scales": torch.full((10,), 0.5).double(), "size": torch.tensor(0.7).double()}
        w = bl.scipy_fit(bl.Problem(process.inner, process.outer), inner_args=(x, y))(hparams, torch.zeros(40).double())
        alpha = float(torch.exp(-2 * hparams["size"]))
        ridge = KernelRidge(kernel="rbf", gamma=0.5 * np.exp(-1.0), alpha=alpha).fit(x.numpy(), y.numpy())
        expected = ridge.predict(x_test[:50].numpy())
        assert relative_error(process.predict(w, hparams, x_test[:50]), expected) < 1e-4

    @pytest.mark.slow
    def test_hypergradients_are_ahead_with_wrong_targets(self, kernel, run):
        found = run(kernel)
        error = {name: row["error"] for name, row in found.items()}
        tuned = error["scale per feature, hypergradients, 10% wrong"]
        assert tuned < 0.95 * error["one scale, grid search, 10% wrong"]
        assert tuned < 0.95 * error["scale per feature, likelihood, 10% wrong"]


@pytest.fixture(scope="module")
def epidemic():
    pytest.importorskip("jax")
    return example("gallery/epidemic.py")


class TestEpidemic:
    def test_the_model_conserves_people(self, epidemic):
        """The first step in closed form, and no more infections than people."""
        rates, start = np.full((60, 2), 0.8), np.array([10.0, 1000.0])
        new = np.array(epidemic.simulate(rates, start))
        expected = (epidemic.PEOPLE - start) * -np.expm1(-0.8 * start / epidemic.PEOPLE)
        new /= epidemic.REPORTED
        assert relative_error(new[0], expected) < 1e-5
        assert (new.sum(0) < epidemic.PEOPLE).all()
        assert (new.sum(0) > 0.9 * epidemic.PEOPLE).all()

    def test_each_day_is_fitted_or_held_out(self, epidemic):
        _, train, held_out = epidemic.make(0)
        np.testing.assert_array_equal(train.mask + held_out.mask, 1)
        np.testing.assert_array_equal(train.cases, held_out.cases)

    @pytest.mark.slow
    def test_a_weight_per_week_finds_the_rates_better(self, epidemic, run):
        found = run(epidemic)
        one, weekly = found["one weight, grid search"], found["a weight per week"]
        assert weekly["misfit"] < one["misfit"]
        assert weekly["error"] < 0.9 * one["error"]
