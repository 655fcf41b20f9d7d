"""The examples for SciPy and scikit-learn: what they promise, on few steps and rows."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from frameworks import relative_error

pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import bilevel as bl
from bilevel.testing import check_hypergradient

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "solver.toml"


def load(name):
    """Import an example by its path, as nothing installs them."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "scipy" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


estimator, sparse_penalties = load("estimator"), load("sparse_penalties")


@cache
def run(example, *options):
    return example.main(options)


class TestEstimator:
    @pytest.fixture
    def ran(self):
        return run(estimator, "--steps", "10")

    def test_tuned_weights_lower_both_losses(self, ran):
        for part in (0, 1):
            assert ran["tuned"][part][0] < 0.8 * ran["untuned"][part][0]

    def test_wrong_labels_end_with_less_weight(self, ran):
        train, *_, truth = estimator.load(0)
        weights, wrong = ran["weights"], train.y != truth
        assert weights.min() >= 0
        assert weights.max() <= 1
        assert weights[wrong].mean() < weights[~wrong].mean() - 0.2
        assert ran["found"] > 0.8

    def test_derivatives_are_those_of_what_scikit_learn_minimizes(self):
        """Against differences of refits: they know scikit-learn's objective, the formulas do not enter."""
        train, validation, _, _ = estimator.load(0)
        train = estimator.Part(train.X[:200], train.y[:200])
        model = LogisticRegression(C=0.3, solver="newton-cg", tol=1e-12, max_iter=1000)
        rng = np.random.default_rng(1)
        weights, direction = rng.uniform(0.2, 1, 200), rng.standard_normal(200)

        def loss(weights):
            p = model.fit(*train, sample_weight=weights).predict_proba(validation.X)
            return log_loss(validation.y, p)

        difference = (loss(weights + 1e-3 * direction) - loss(weights - 1e-3 * direction)) / 2e-3
        value = loss(weights)
        lin = estimator.linearize(model, weights, train, validation)
        hg = bl.hypergradient_from(lin, solver=bl.CG(rtol=1e-10, maxiter=5000))
        assert hg.value == pytest.approx(value, rel=1e-12)
        assert hg.grad @ direction == pytest.approx(difference, rel=1e-5)

    def test_a_config_chooses_the_solver(self):
        by_default, configured = run(estimator, "--steps", "1"), run(estimator, "--steps", "1", "--config", str(CONFIG))
        assert configured["solver"] == bl.get_solver(CONFIG)
        assert relative_error(configured["weights"], by_default["weights"]) > 1e-3  # its damping shows

    def test_a_config_of_another_solver_is_refused_by_name(self, tmp_path):
        (tmp_path / "solver.toml").write_text('[solver]\nname = "gc"\n')
        with pytest.raises(ValueError, match=r"'gc'.*'cg'"):
            estimator.main(["--config", str(tmp_path / "solver.toml")])


class TestSparsePenalties:
    @pytest.fixture
    def ran(self):
        return run(sparse_penalties, "--rows", "2000", "--steps", "4")

    def test_a_penalty_per_feature_beats_the_shared_one(self, ran):
        assert ran["tuned"]["validation"] < ran["shared"]["validation"] - 0.01
        assert ran["tuned"]["test"] < ran["shared"]["test"] - 0.001

    def test_penalties_rise_from_the_shared_one_and_differ(self, ran):
        assert ran["C"].shape == (124,)
        assert ran["C"].min() >= 1e-4 * (1 - 1e-9)
        assert ran["C"].max() <= ran["shared C"] * (1 + 1e-9)
        assert ran["C"].max() > 10 * ran["C"].min()

    def test_the_config_serves_here_too(self):
        options = "--rows", "1000", "--steps", "1"
        by_default, configured = (
            run(sparse_penalties, *options),
            run(sparse_penalties, *options, "--config", str(CONFIG)),
        )
        assert configured["solver"] == bl.get_solver(CONFIG)
        assert relative_error(configured["C"], by_default["C"]) > 1e-3

    def test_scikit_learn_fits_what_the_problem_says(self):
        """The inner gradient vanishes at scikit-learn's solution, and the hypergradient there is that of refits."""
        X, y, _, _ = sparse_penalties.make(0)
        X, X_val = (sparse_penalties.with_ones(X[part]) for part in (slice(200), slice(200, 400)))
        hparams = np.random.default_rng(0).uniform(-6, -2, X.shape[1])
        w = sparse_penalties.fit(X, y[:200], np.exp(-hparams) / 200, np.zeros(X.shape[1]))
        problem = bl.problems.logistic_regression()
        assert np.abs(problem.inner.grad(w, hparams, X, y[:200])).max() < 1e-9
        data = {"inner_args": (X, y[:200]), "outer_args": (X_val, y[200:400])}
        check_hypergradient(problem, w, hparams, **data, solver=bl.CG(rtol=1e-10), reference="finite-differences")


class TestData:
    ROWS = "-1 3:1 11:1\n+1 1:1 3:0.5\n"

    def test_files_of_libsvm_are_read(self, tmp_path):
        (tmp_path / "a9a").write_text(self.ROWS)
        (tmp_path / "a9a.t").write_text("+1 2:1\n")
        X, y, X_test, y_test = sparse_penalties.read(tmp_path)
        expected = np.zeros((2, 11))
        expected[0, [2, 10]], expected[1, [0, 2]] = 1, [1, 0.5]
        np.testing.assert_array_equal(X.toarray(), expected)
        np.testing.assert_array_equal(y, [-1, 1])
        assert X_test.shape == (1, 11)
        assert y_test == [1]

    def test_a_file_that_is_missing_is_named(self, tmp_path):
        (tmp_path / "a9a").write_text(self.ROWS)
        with pytest.raises(SystemExit, match=r"--data: .*a9a\.t") as raised:
            sparse_penalties.main(["--data", str(tmp_path)])
        assert "a folder" in str(raised.value)

    def test_made_data_are_the_size_and_kind_of_a9a(self):
        X, y, X_test, y_test = sparse_penalties.make(0)
        assert [X.shape, X_test.shape, y.shape, y_test.shape] == [(32560, 123), (16281, 123), (32560,), (16281,)]
        np.testing.assert_array_equal(X.sum(1), 14)
        assert (X.data == 1).all()
        assert 0.2 < y.mean() < 0.5
        assert (X.sum(0) < 100).sum() > 5

    def test_the_last_column_is_ones_with_indices_of_32_bits(self):
        X = sparse_penalties.with_ones(sparse_penalties.make(0)[0][:10])
        assert X.indices.dtype == np.int32
        np.testing.assert_array_equal(X[:, [-1]].toarray(), np.ones((10, 1)))
