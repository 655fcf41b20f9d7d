"""The benchmark of rightness computes what it states: derivatives of runs, matrices and filters."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small():
    from benchmarks.attribution.networks import digits

    return digits(train=40, validation=30)[0]


def objective(name):
    import jax.numpy as jnp

    from benchmarks.attribution.networks import digits, losses
    from benchmarks.attribution.points import network

    _, data = digits(train=40, validation=30)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    return lambda w: losses(network(name).logits(w, x), y).mean()[None]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [("momentum", 0.05), ("adam", 0.003)])
def test_the_derivative_of_a_run_matches_central_differences(small, optimizer, rate):
    from benchmarks.attribution.points import network
    from benchmarks.attribution.runs import Training, retrain, through_run

    net, training = network("attention"), Training(40, optimizer, rate, batch=10)
    truth = through_run(net, training, small, objective("attention"))
    direction = np.random.default_rng(0).standard_normal(40)
    weights = 1 + 1e-5 * np.array([direction, -direction])
    up, down = retrain(net, training, small, objective("attention"), weights)[:, 0]
    np.testing.assert_allclose(truth.gradients[0] @ direction, (up - down) / 2e-5, rtol=1e-6)


@pytest.mark.slow
def test_the_last_block_is_the_whole_of_a_run_of_one_block(small):
    from benchmarks.attribution.points import network
    from benchmarks.attribution.runs import BLOCK, Training, through_run

    one = through_run(network("attention"), Training(BLOCK, batch=10), small, objective("attention"))
    two = through_run(network("attention"), Training(2 * BLOCK, batch=10), small, objective("attention"))
    np.testing.assert_array_equal(one.last, one.gradients)
    assert np.linalg.norm(two.gradients - two.last) > 0.1 * np.linalg.norm(two.last)


@pytest.mark.slow
def test_the_matrices_are_those_of_the_library(small):
    import bilevel as bl
    from benchmarks.attribution.networks import losses
    from benchmarks.attribution.points import network, point

    net = network("attention")
    w, u = net.init(1), np.random.default_rng(0).standard_normal(len(net.init(1)))
    at = point("attention", small, w, objective("attention"))
    for curvature, matrix in (("hessian", at.hessian), ("gauss-newton", at.gauss_newton)):
        problem = bl.Problem.from_model(
            lambda w, weights, x: (net.logits(w, x), weights),
            lambda output, y: (output[1] * losses(output[0], y)).mean(),
            lambda w, weights: w.sum(),
            curvature=curvature,
        )
        products = problem.linearize(bl.get_backend("jax"), w, np.ones(40), (small.x, small.y))
        np.testing.assert_allclose(matrix @ u, products.vjp_params(u), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(at.cross @ u, products.vjp_hparams(u), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(at.grad, products.residual, rtol=1e-9, atol=1e-12)


def diagonal(values):
    """Return a quadratic problem with three objectives, in the basis of its eigenvectors."""
    from benchmarks.attribution.points import Spectral

    rng, n = np.random.default_rng(0), len(values)
    return Spectral(values, rng.standard_normal((3, n)), rng.standard_normal((5, n)), np.zeros(n), np.zeros(3))


def test_solvers_and_filters_agree_on_a_well_conditioned_quadratic():
    from benchmarks.attribution.methods import AUTO, UNDAMPED, filtered, solved
    from benchmarks.attribution.runs import Training

    at = diagonal(np.linspace(0.5, 1, 30))
    training = Training(1000)
    exact = -(at.rhs / at.values) @ at.cross.T
    answers = {answer.method: answer for answer in [*solved(at, at, training), *filtered(at, training)]}
    for method in (
        "CG",
        "Gauss-Newton CG",
        "Neumann, the training's step and steps",
        "MINRES",
        "filter of early stopping",
    ):
        np.testing.assert_allclose(answers[method].gradients, exact, rtol=1e-3, atol=1e-4)
    assert 0 < answers[UNDAMPED].products == answers[AUTO].products


def test_the_automatic_damping_is_twice_the_most_negative_curvature():
    from benchmarks.attribution.methods import auto_damping, lanczos

    values = np.concatenate([[-0.3], np.linspace(0, 2, 50)])
    at = diagonal(values)
    assert auto_damping(at) == pytest.approx(0.6, rel=1e-6)
    ritz, shares = lanczos(values, at.rhs[0])
    assert ritz[0] == pytest.approx(-0.3)
    assert ritz[-1] == pytest.approx(2)
    assert shares.sum() == pytest.approx(1)
    assert shares @ ritz == pytest.approx(at.rhs[0] ** 2 @ values / (at.rhs[0] @ at.rhs[0]))


def test_early_stopping_is_the_derivative_of_a_run_on_a_quadratic():
    from benchmarks.attribution.methods import early_stopping
    from benchmarks.attribution.runs import MOMENTUM, Training

    values, target, training = np.array([-0.2, 0.0, 0.1, 3.0]), 0.7, Training(40)
    w = m = np.zeros(4)
    for _ in range(40):  # on μ w²/2 − target·w
        m = MOMENTUM * m + values * w - target
        w = w - training.rate * m
    np.testing.assert_allclose(early_stopping(values, training), w / target, rtol=1e-12)


def test_the_score_of_the_right_gradients_is_one():
    from benchmarks.attribution.lds import cosine, score

    rng = np.random.default_rng(0)
    gradients, weights = rng.standard_normal((3, 20)), (rng.random((12, 20)) < 0.9).astype(float)
    actual = np.exp(0.1 * (weights @ gradients.T))
    assert score(gradients, weights, actual) == pytest.approx(1)
    assert score(-gradients, weights, actual) == pytest.approx(-1)
    assert cosine(gradients, 2 * gradients) == pytest.approx(1)


@pytest.mark.slow
def test_a_quick_run_prints_and_writes_all_tables(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.attribution", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    for record in result["cosines"]:
        cosines = [cosine for cosine, _ in record["rows"].values()]
        assert np.abs(cosines).max() <= 1 + 1e-9
        assert record["rows"]["filter of early stopping"][0] > 0.5
        assert all(np.isfinite(value) for value in record["measures"].values())
    whole, *others = result["scores"][0]["rows"].values()
    assert whole[0] > 0.9
    assert whole[0] >= max(score for score, *_ in others) - 0.05
    again = [sys.executable, "-m", "benchmarks.attribution", "--from-json", str(file)]
    printed = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed in done.stdout
    assert sum(line.startswith("|") for line in printed.splitlines()) > 60
