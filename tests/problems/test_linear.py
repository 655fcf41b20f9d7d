"""Weights of examples and features without a penalty in the ready linear models."""

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl
from bilevel.testing import check_hypergradient

N, D = 12, 3
GROUPS = [0, 1, -1]  # the last feature has no penalty


def make_data(kind, seed=0):
    rng = np.random.default_rng(seed)
    X, z = np.column_stack([rng.standard_normal((N, D - 1)), np.ones(N)]), rng.standard_normal(N)
    return X, z if kind == "ridge" else (z > 0).astype(float), rng.integers(1, 4, N).astype(float)


@pytest.mark.parametrize("kind", ["ridge", "logistic_regression"])
def test_derivatives_with_weights_and_without_penalty_are_differences_of_refits(backend, kind):
    problem = getattr(bl.problems, kind)(GROUPS)
    data = tuple(backend.from_numpy(a) for a in make_data(kind))
    args = {"inner_args": data, "outer_args": tuple(backend.from_numpy(a) for a in make_data(kind, 1))}
    hparams = backend.from_numpy(np.array([-1.0, -2.0]))
    params = bl.scipy_fit(problem, inner_args=data)(hparams, backend.from_numpy(np.zeros(D)))
    for reference in ("exact", "finite-differences"):
        solver = bl.CG(rtol=1e-10)
        check_hypergradient(problem, params, hparams, **args, solver=solver, reference=reference)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("ridge", (D,)), ("ridge", (D, 2)), ("logistic_regression", (D,)), ("logistic_regression", (D, 2)), ("svm", (D,))],
)
def test_weights_count_rows(kind, shape):
    rng = np.random.default_rng(2)
    w, v, hparams = rng.standard_normal(shape), rng.standard_normal(shape), np.zeros(2)
    X, y, s = make_data(kind)
    if len(shape) == 2:
        y = np.stack([y, -y], 1) if kind == "ridge" else y.astype(int)
    inner = getattr(bl.problems, kind)(GROUPS).inner
    repeat = np.repeat(np.arange(N), s.astype(int))
    assert inner(w, hparams, X, y, s) == pytest.approx(inner(w, hparams, X[repeat], y[repeat]), rel=1e-12)
    for method, given in (("grad", ()), ("hvp", (v,)), ("cross_vjp", (v,))):
        weighted, repeated = (
            getattr(inner, method)(w, hparams, *given, *args) for args in ((X, y, s), (X[repeat], y[repeat]))
        )
        assert relative_error(weighted, repeated) <= 1e-12, method


def test_without_a_penalty_the_fit_is_least_squares():
    X, y, _ = make_data("ridge")
    problem = bl.problems.ridge([-1, 0, -1])
    w = bl.scipy_fit(problem, inner_args=(X, y))(np.array([30.0]), np.zeros(D))  # a huge penalty for one feature
    expected = np.linalg.lstsq(X[:, [0, 2]], y, rcond=None)[0]
    assert relative_error(w[[0, 2]], expected) <= 1e-6
    assert abs(w[1]) < 1e-10


def test_invalid_weights_and_groups_are_named():
    X, y, s = make_data("ridge")
    with pytest.raises(ValueError, match=r"sample_weight: expected shape \(12,\), with the rows of X, got \(11,\)"):
        bl.problems.ridge().inner(np.zeros(D), np.zeros(D), X, y, s[1:])
    with pytest.raises(ValueError, match="groups: expected indices from 0, or -1 for no penalty, got -2"):
        bl.problems.ridge([0, -2])
