"""The losses of linear models: values against scikit-learn, derivatives against differences and autodiff."""

import numpy as np
import pytest
from frameworks import DTYPES, installed, relative_error, tolerance

import bilevel as bl
from bilevel.problems.losses import CrossEntropy, Huber, LeastSquares, Poisson, SquaredHinge

LOSSES = [LeastSquares(), CrossEntropy(), SquaredHinge(), Huber(0.5), Poisson()]
MODELS = {"svm": {}, "huber": {"threshold": 0.5}, "poisson": {}}


def data(model, n=30, d=5, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    z = X @ rng.uniform(-1, 1, d) + rng.standard_normal(n)
    return X, {"svm": np.sign(z), "huber": z, "poisson": rng.poisson(np.exp(0.5 * z)).astype(float)}[model]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_slopes_and_bends_are_derivatives(loss):
    """The points are away from the kinks of the slopes."""
    rng = np.random.default_rng(0)
    z, y, dz, h = rng.uniform(-3, 3, 50), rng.integers(0, 2, 50).astype(float), rng.standard_normal(50), 1e-5
    slopes = (loss(z + h, y) - loss(z - h, y)) / (2 * h)
    assert relative_error(loss.slopes(z, y), slopes) <= 1e-9
    bends = (loss.slopes(z + h * dz, y) - loss.slopes(z - h * dz, y)) / (2 * h)
    assert relative_error(loss.bend(z, y, dz), bends) <= 1e-9


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_analytic_and_automatic_derivatives_agree(model, dtype):
    train, val = data(model), data(model, seed=1)
    problem = getattr(bl.problems, model)(groups=[0, 1, 1, 0, 1], **MODELS[model])
    grads = {}
    for name, backend in installed().items():
        w, h, *rest = (
            backend.from_numpy(a.astype(dtype)) for a in (np.linspace(-0.5, 0.5, 5), np.zeros(2), *train, *val)
        )
        hg = bl.hypergradient(problem, w, h, inner_args=tuple(rest[:2]), outer_args=tuple(rest[2:]), solver="exact")
        grads[name] = backend.to_numpy(hg.grad)
        assert grads[name].dtype == dtype
    if len(grads) == 1:
        pytest.skip("neither torch nor jax is installed")
    for name in grads:
        assert relative_error(grads[name], grads["numpy"]) <= tolerance(dtype, condition=20), name


@pytest.mark.parametrize("model", MODELS)
def test_hypergradients_match_differences_of_refits(model):
    problem = getattr(bl.problems, model)(**MODELS[model])
    args = {"inner_args": data(model), "outer_args": data(model, seed=1)}
    first_fit = bl.scipy_fit(problem, inner_args=args["inner_args"])

    def fit(h, w):
        w = first_fit(h, w)
        for _ in range(3):  # steps of Newton's method, since differences need an accurate minimum
            hessian = np.array([problem.inner.hvp(w, h, e, *args["inner_args"]) for e in np.eye(5)])
            w = w - np.linalg.solve(hessian, problem.inner.grad(w, h, *args["inner_args"]))
        return w

    h = np.array([-2.0, -1.5, -1.0, -2.5, -2.0])
    w = fit(h, np.zeros(5))
    hg = bl.hypergradient(problem, w, h, **args, solver=bl.CG(rtol=1e-12))
    step, differences = 1e-4, []
    for e in np.eye(5):
        values = [problem.outer(fit(h + s * step * e, w), h, *args["outer_args"]) for s in (1, -1)]
        differences.append((values[0] - values[1]) / (2 * step))
    assert relative_error(hg.grad, differences) <= 1e-6


class TestScikitLearn:
    """The units of the penalties, as the docstrings state them."""

    def test_svm(self):
        svm = pytest.importorskip("sklearn.svm")
        X, y = data("svm")
        model = svm.LinearSVC(
            C=1 / (2 * 30 * 0.1), fit_intercept=False, tol=1e-12, max_iter=100_000, random_state=0
        ).fit(X, y)
        gradient = bl.problems.svm().inner.grad(model.coef_[0], np.log(0.1), X, y)
        assert np.linalg.norm(gradient) <= 1e-7

    def test_poisson(self):
        linear_model = pytest.importorskip("sklearn.linear_model")
        X, y = data("poisson")
        model = linear_model.PoissonRegressor(alpha=0.1, fit_intercept=False, solver="newton-cholesky", tol=1e-10)
        gradient = bl.problems.poisson().inner.grad(model.fit(X, y).coef_, np.log(0.1), X, y)
        assert np.linalg.norm(gradient) <= 1e-8


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan")])
def test_a_threshold_that_is_not_positive(threshold):
    with pytest.raises(ValueError, match="huber: expected a threshold > 0"):
        bl.problems.huber(threshold=threshold)
