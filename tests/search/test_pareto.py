"""Weighted sums of several outer objectives against closed forms."""

import numpy as np
import pytest
from frameworks import namespace, relative_error

import bilevel as bl

TARGETS = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
WEIGHTS = np.array([[1.0, 1.0, 2.0], [3.0, 1.0, 0.0]])


def quadratics(backend):
    """Return a problem with w*(λ) = λ, and three objectives ½‖w − t‖² + λ₀/10."""
    eye, direct = backend.from_numpy(np.eye(2)), backend.from_numpy(np.array([0.1, 0.0]))
    problems = [bl.problems.quadratic(eye, eye, backend.from_numpy(t), direct=direct) for t in TARGETS]
    return problems[0], [problem.outer for problem in problems]


def test_the_minima_of_quadratics_are_weighted_means(backend):
    problem, objectives = quadratics(backend)
    start = backend.from_numpy(np.ones(2))
    found = bl.pareto(problem, objectives, start, weights=WEIGHTS, fit=lambda h, _: h, options={"gtol": 1e-9})
    for weights, result in zip(WEIGHTS, found, strict=True):
        assert result.success, result.message
        x = weights @ TARGETS / weights.sum() - np.array([0.1, 0])
        assert relative_error(backend.to_numpy(result.x), x) <= 1e-6
        values = [0.5 * ((x - t) ** 2).sum() + 0.1 * x[0] for t in TARGETS]
        assert relative_error(result.objectives, values) <= 1e-6
        assert result.fun == pytest.approx(weights @ values, rel=1e-6)


def test_plain_functions_are_differentiated(backend):
    if backend.name == "numpy":
        pytest.skip("the numpy backend needs objects with analytic derivatives")
    xp = namespace(backend)
    problem = bl.Problem(lambda w, h: 0.5 * ((w - h) ** 2).sum(), lambda w, h: w.sum())
    objectives = [lambda w, h: (w**2).sum(), lambda w, h: xp.exp(w).sum()]
    options = {"fit": lambda h, _: h, "options": {"gtol": 1e-9}}
    [found] = bl.pareto(problem, objectives, backend.from_numpy(np.ones(2)), weights=[(1, 2)], **options)
    x = backend.to_numpy(found.x)
    assert np.abs(2 * x + 2 * np.exp(x)).max() <= 1e-6


def test_cross_validation():
    rng = np.random.default_rng(0)
    X, y, rows = rng.standard_normal((12, 3)), rng.standard_normal(12), np.arange(12)
    folds = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)]
    cv, other = bl.problems.k_fold(bl.problems.ridge(), folds), bl.problems.huber(threshold=0.1)
    fit = bl.newton_fit(cv, inner_args=(X, y))
    [found] = bl.pareto(
        cv,
        [cv.problem.outer, other.outer],
        np.zeros(3),
        weights=[(1, 1)],
        fit=fit,
        inner_args=(X, y),
        outer_args=(X, y),
        bounds=(-5, 5),
    )
    values = [
        np.mean([F(w, None, X[b], y[b]) for w, (_, b) in zip(found.params, folds, strict=True)])
        for F in (cv.problem.outer, other.outer)
    ]
    assert relative_error(found.objectives, values) <= 1e-12
    assert found.fun == pytest.approx(sum(values))


def test_wrong_weights_and_objectives():
    problem = bl.problems.quadratic(np.eye(2), np.eye(2), np.zeros(2))
    call = {"problem": problem, "hparams0": np.ones(2), "fit": lambda h, _: h}
    for weights in ([(1, 2)], [(-1,)], [(0,)], [1.0], [("a",)]):
        with pytest.raises(ValueError, match="weights: expected rows of 1 numbers >= 0, one for each objective"):
            bl.pareto(objectives=[problem.outer], weights=weights, **call)
    with pytest.raises(TypeError, match=r"objectives\[0\]: expected a function, got str"):
        bl.pareto(objectives=["F"], weights=[(1,)], **call)
    with pytest.raises(TypeError, match="objectives: expected a list of functions, got _Outer"):
        bl.pareto(objectives=problem.outer, weights=[(1,)], **call)
    with pytest.raises(TypeError, match="has no method 'grad', which the numpy backend needs"):
        bl.pareto(objectives=[lambda w, h: w.sum()], weights=[(1,)], **call)
