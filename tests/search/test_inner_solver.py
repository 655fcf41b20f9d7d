"""The inner problem solved by SciPy, in every framework."""

import warnings

import numpy as np
import pytest
from frameworks import DTYPES, relative_error, tolerance

import bilevel as bl
from bilevel import scipy_fit

RIDGE = bl.problems.ridge()


def ridge_data(seed=0, n=40, d=6):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, X @ rng.standard_normal(d) + rng.standard_normal(n)


def ridge_minimum(X, y, hparams):
    return np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(hparams)), X.T @ y / len(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG"])
def test_fit_reaches_the_closed_form(backend, dtype, method):
    X, y = ridge_data()
    hparams = np.linspace(-3, 0, 6)
    args = tuple(backend.from_numpy(a.astype(dtype)) for a in (X, y))
    fit = scipy_fit(RIDGE, inner_args=args, method=method)
    params = fit(backend.from_numpy(hparams.astype(dtype)), backend.from_numpy(np.zeros(6, dtype)))
    # Rounding of the loss hides what the square root of epsilon changes in the parameters.
    assert relative_error(backend.to_numpy(params), ridge_minimum(X, y, hparams)) <= tolerance(dtype) ** 0.5
    assert backend.to_numpy(params).dtype == dtype


def _distance(w, h):
    return ((w - h) ** 2).sum()


class PerLeaf:
    """L = Σ over leaves of ½ (w − λ)²: trees in, trees out."""

    def __call__(self, w, h):
        return 0.5 * ((w["a"] - h["a"]) ** 2).sum() + 0.5 * ((w["b"][0] - h["b"][0]) ** 2).sum()

    def grad(self, w, h):
        return {"a": w["a"] - h["a"], "b": [w["b"][0] - h["b"][0]]}


def test_fit_keeps_trees_and_leaves_its_input_alone(backend):
    def tree(a, b):
        return {"a": backend.from_numpy(a), "b": [backend.from_numpy(b)]}

    hparams, params0 = tree(np.arange(6.0).reshape(2, 3), np.ones(2)), tree(np.zeros((2, 3)), np.zeros(2))
    params = scipy_fit(bl.Problem(PerLeaf(), PerLeaf()))(hparams, params0)
    assert relative_error(backend.to_numpy(params["a"]), np.arange(6.0).reshape(2, 3)) <= 1e-8
    assert relative_error(backend.to_numpy(params["b"][0]), np.ones(2)) <= 1e-8
    for _, leaf in backend.leaves(params0):
        assert not backend.to_numpy(leaf).any()


def test_a_fit_that_stops_early_warns():
    X, y = ridge_data()
    fit = scipy_fit(RIDGE, inner_args=(X, y), maxiter=2)
    with pytest.warns(bl.SolverWarning, match=r"scipy_fit stopped after 2 iterations .* raise maxiter or gtol"):
        fit(np.full(6, -3.0), np.zeros(6))


def test_a_fit_warns_again_only_if_it_gets_much_worse(recwarn):
    warnings.simplefilter("always")
    X, y = ridge_data()
    fit = scipy_fit(RIDGE, inner_args=(X, y), maxiter=2)
    for _ in range(3):
        fit(np.full(6, -3.0), np.zeros(6))
    assert len(recwarn) == 1
    fit(np.full(6, -3.0), np.full(6, 1e6))
    assert len(recwarn) == 2


def test_a_fit_that_rounding_stops_does_not_warn():
    X, y = (a.astype(np.float32) for a in ridge_data())
    hparams = np.full(6, -3, np.float32)
    params = scipy_fit(RIDGE, inner_args=(X, y), gtol=1e-30)(hparams, np.zeros(6, np.float32))
    assert relative_error(params, ridge_minimum(X, y, hparams)) <= 1e-3


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_fit_of_nan_warns():
    X, y = ridge_data()
    with pytest.warns(bl.SolverWarning, match="scipy_fit stopped"):
        scipy_fit(RIDGE, inner_args=(X, y))(np.full(6, 1e4), np.ones(6))


def test_a_fit_without_a_start_says_where_it_belongs():
    with pytest.raises(ValueError, match=r"params0: .* bl\.minimize\(\.\.\., params0="):
        scipy_fit(RIDGE, inner_args=ridge_data())(np.zeros(6), None)


def test_a_plain_function_on_numpy_is_told_what_it_lacks():
    problem = bl.Problem(lambda w, h: (w**2).sum(), lambda w, h: (w**2).sum())
    with pytest.raises(TypeError, match="no method 'grad', which the numpy backend needs"):
        scipy_fit(problem)(np.zeros(2), np.ones(2))


def test_integer_params_are_refused_by_name():
    with pytest.raises(TypeError, match="params: expected a floating-point leaf"):
        scipy_fit(RIDGE, inner_args=ridge_data())(np.zeros(6), np.zeros(6, int))


def test_jax_compiles_once_for_all_fits():
    jnp = pytest.importorskip("jax.numpy")
    traces = []

    def inner(w, h):
        traces.append(1)
        return 0.5 * ((w - h) ** 2).sum()

    fit = scipy_fit(bl.Problem(inner, inner))
    fit(jnp.ones(3), jnp.zeros(3))
    first = len(traces)
    fit(2 * jnp.ones(3), jnp.ones(3))
    scipy_fit(bl.Problem(inner, inner))(3 * jnp.ones(3), jnp.ones(3))
    assert len(traces) == first


def test_torch_parameters_stay_as_they_are():
    torch = pytest.importorskip("torch")
    params0, hparams = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    params = scipy_fit(bl.Problem(_distance, _distance))(hparams, params0)
    assert not params.requires_grad
    assert params0.grad is None
    assert not params0.detach().any()
    torch.testing.assert_close(params, hparams)
