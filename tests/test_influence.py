"""Influence scores against the dense Hessian, retraining with less of an example, and single hypergradients."""

import numpy as np
import pytest
from frameworks import framework, relative_error

import bilevel as bl
import bilevel.testing

N, Q, D = 12, 3, 4
PENALTY = 0.05


class Ridge:
    """L = Σ λ_i (x_i·w − y_i)² / 2N + PENALTY ‖w‖² / 2."""

    def __call__(self, w, h, x, y):
        return 0.5 * (h * (x @ w - y) ** 2).sum() / N + 0.5 * PENALTY * (w @ w)

    def grad(self, w, h, x, y):
        return x.T @ (h * (x @ w - y)) / N + PENALTY * w

    def hvp(self, w, h, v, x, y):
        return x.T @ (h * (x @ v)) / N + PENALTY * v

    def cross_vjp(self, w, h, v, x, y):
        return (x @ v) * (x @ w - y) / N


class Errors:
    """F_q = (x_q·w − y_q)² / 2."""

    def __call__(self, w, h, x, y):
        return 0.5 * (x @ w - y) ** 2

    def grad(self, w, h, x, y):
        return (x @ w - y)[:, None] * x, None


PROBLEM = bl.Problem(Ridge(), Errors())


def fit(weights, x, y):
    return np.linalg.solve(x.T @ (weights[:, None] * x) / N + PENALTY * np.eye(D), x.T @ (weights * y) / N)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, D)), rng.standard_normal(n)) for n in (N, Q)]


def scores_of(backend, data, weights=None, **options):
    (x, y), (xq, yq) = data
    weights = np.ones(N) if weights is None else weights
    move = backend.from_numpy
    return backend.to_numpy(
        bl.influence(
            PROBLEM,
            move(fit(weights, x, y)),
            move(weights),
            inner_args=(move(x), move(y)),
            outer_args=(move(xq), move(yq)),
            **{"solver": bl.CG(rtol=1e-12), **options},
        )
    )


def test_scores_are_the_dense_influence_functions(backend, data):
    (x, y), (xq, yq) = data
    w = fit(np.ones(N), x, y)
    hessian = x.T @ x / N + PENALTY * np.eye(D)
    # Koh & Liang, equation 2: I_up,loss(z, z_test) = −∇L(z_test)ᵀ H⁻¹ ∇L(z)
    up = -((xq @ w - yq)[:, None] * xq) @ np.linalg.solve(hessian, ((x @ w - y)[:, None] * x).T)
    assert relative_error(scores_of(backend, data), up / N) <= 1e-10


def test_scores_predict_the_loss_without_a_part_of_an_example(data):
    """The signs and the scale: F falls by score·part, up to the square of the part."""
    (x, y), (xq, yq) = data
    weights = np.random.default_rng(1).uniform(0.5, 2.0, N)
    scores = scores_of(framework("numpy"), data, weights)
    before, part = Errors()(fit(weights, x, y), None, xq, yq), 1e-4
    for i in range(N):
        less = weights - part * weights * (np.arange(N) == i)
        change = Errors()(fit(less, x, y), None, xq, yq) - before
        assert np.allclose(change, -scores[:, i] * part * weights[i], rtol=1e-3, atol=1e-9), i


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_of_a_network_equal_single_calls_and_the_dense_hessian(name, dtype):
    backend, rng = framework(name), np.random.default_rng(0)
    tanh = backend.space(backend.from_numpy(np.ones(1))).leaf_xp.tanh

    def losses(w, x, y):
        return (tanh(x @ w["a"]) @ w["b"] - y) ** 2

    def inner(w, h, x, y):
        return (h * losses(w, x, y)).mean() + 0.01 * ((w["a"] ** 2).sum() + (w["b"] ** 2).sum())

    many = bl.Problem(inner, lambda w, h, x, y: losses(w, x, y))
    single = bl.Problem(inner, lambda w, h, x, y: losses(w, x, y).mean())

    def move(*arrays):
        return tuple(backend.from_numpy(a.astype(dtype)) for a in arrays)

    data, queries = (move(rng.standard_normal((n, 3)), rng.standard_normal(n)) for n in (20, 6))
    ones = move(np.ones(20))[0]
    start = dict(zip("ab", move(rng.standard_normal((3, 5)), rng.standard_normal(5)), strict=True))
    options = {"method": "L-BFGS-B", "options": {"maxiter": 500}}
    params = bl.scipy_fit(many, inner_args=data, **options)(ones, start)
    solver = {"name": "cg", "damping": 0.01, "rtol": 1e-5 if dtype is np.float32 else 1e-11}
    scores = backend.to_numpy(bl.influence(many, params, ones, inner_args=data, outer_args=queries, solver=solver))
    limit = 1e-4 if dtype is np.float32 else 1e-9
    for q in range(6):
        query = tuple(array[q : q + 1] for array in queries)
        args = {"inner_args": data, "outer_args": query}
        one = bl.hypergradient(single, params, ones, solver=solver, **args).grad
        assert relative_error(scores[q], backend.to_numpy(one)) <= limit
        dense = bl.testing.exact_hypergradient(single, params, ones, damping=0.01, **args).grad
        assert relative_error(scores[q], backend.to_numpy(dense)) <= 10 * limit


def test_weights_of_another_shape_are_named(backend, data):
    (x, y), (xq, yq) = data
    move = backend.from_numpy
    args = {"inner_args": (move(x), move(y)), "outer_args": (move(xq), move(yq))}
    with pytest.raises(
        ValueError, match=r"weights: expected one array of shape \(N,\).*got an array of shape \(12, 1\)"
    ):
        bl.influence(PROBLEM, move(np.ones(D)), move(np.ones((N, 1))), **args)
    with pytest.raises(ValueError, match=r"weights: expected one array.*got list\. For other .*bl\.hypergradients"):
        bl.influence(PROBLEM, move(np.ones(D)), [move(np.ones(N))], **args)
