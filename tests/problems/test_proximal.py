"""Proximal and projected problems: against differences of re-solved problems, scikit-learn and fixed points."""

from functools import cache

import numpy as np
import pytest
from frameworks import moved, relative_error
from proximal_cases import Case

import bilevel as bl
from bilevel import projections, prox

PER_ROW = np.linspace(-1.5, 0.5, 8)
GROUPS = [0, 0, 1, 2, 2, 1, 0, 1]
MATRIX = np.random.default_rng(1).standard_normal((2, 8))
CASES = {
    "l1": (bl.Proximal, prox.l1("penalty"), {"penalty": -0.5}),
    "l1, per feature": (bl.Proximal, prox.l1("penalty"), {"penalty": PER_ROW}),
    "l1, per weight": (bl.Proximal, prox.l1("penalty"), {"penalty": np.linspace(-2, 0.5, 12).reshape(6, 2)}, (6, 2)),
    "l1, groups": (bl.Proximal, prox.l1("penalty", groups=GROUPS), {"penalty": [-1.0, 0.0, -0.5]}),
    "l1, constant": (bl.Proximal, prox.l1(0.5), {}),
    "elastic net": (bl.Proximal, prox.elastic_net(), {"l1": -0.5, "l2": -1.0}),
    "elastic net, per row": (bl.Proximal, prox.elastic_net(), {"l1": np.linspace(-2, 0, 6), "l2": -1.0}, (6, 2)),
    "group lasso": (bl.Proximal, prox.group_lasso(GROUPS, "penalty"), {"penalty": 0.5}),
    "group lasso, per group": (bl.Proximal, prox.group_lasso(GROUPS, "penalty"), {"penalty": [0.9, -0.5, 1.2]}),
    "group lasso, rows": (bl.Proximal, prox.group_lasso(range(6), "penalty"), {"penalty": PER_ROW[:6] + 1}, (6, 2)),
    "total variation": (bl.Proximal, prox.total_variation("penalty"), {"penalty": -0.5}),
    "nuclear norm, tall": (bl.Proximal, prox.nuclear_norm("penalty"), {"penalty": 0.9}, (6, 4)),
    "nuclear norm, wide": (bl.Proximal, prox.nuclear_norm("penalty"), {"penalty": 0.9}, (4, 6)),
    "box": (bl.Projected, projections.box("low", "high"), {"low": -0.5, "high": np.linspace(0.2, 0.9, 8)}),
    "nonnegative": (bl.Projected, projections.nonnegative(), {}),
    "simplex": (bl.Projected, projections.simplex("radius"), {"radius": 2.0}),
    "simplex, rows": (bl.Projected, projections.simplex(), {}, (4, 5)),
    "l1 ball": (bl.Projected, projections.l1_ball("radius"), {"radius": 2.5}),
    "l1 ball, inside": (bl.Projected, projections.l1_ball("radius"), {"radius": 100.0}),
    "l2 ball": (bl.Projected, projections.l2_ball("radius"), {"radius": 1.5}),
    "l2 ball, inside": (bl.Projected, projections.l2_ball(100.0), {}),
    "affine": (bl.Projected, projections.affine(MATRIX, "b"), {"b": [1.0, -0.5]}),
}
IN_JAX = ("l1", "group lasso", "nuclear norm, tall", "total variation", "box", "simplex")  # it compiles each case


@cache
def case_of(name):
    return Case(*CASES[name])


@pytest.fixture(params=CASES)
def case(request):
    return case_of(request.param)


def flat(backend, tree):
    return np.concatenate([np.ravel(backend.to_numpy(tree[key])) for key in sorted(tree)])


def test_the_gradient_is_the_slope_of_the_solved_problem(backend, case, request):
    if backend.name == "jax" and request.node.callspec.params["case"] not in IN_JAX:
        pytest.skip("the products are compared with NumPy's below")
    hg = bl.hypergradient(**case.arguments(backend), solver={"name": "cg", "rtol": 1e-12})
    assert hg.info.status is bl.Status.CONVERGED
    assert hg.info.kinks == 0
    assert abs(hg.info.value_error) <= 1e-10
    assert relative_error(flat(backend, hg.grad), flat(bl.get_backend("numpy"), case.slopes)) <= 1e-6


def test_products_are_derivatives_of_the_operator(backend, case):
    """The products by v are also symmetric. NumPy has formulas, and the other frameworks differentiate `apply`."""
    rng = np.random.default_rng(2)
    v, c = 2 * rng.standard_normal((2, *case.shape))
    h, operator = case.hparams, case.operator
    given, vector = moved(backend, (v, h)), moved(backend, c)
    by_v, by_h = backend.run(_products, operator, *given, vector)
    step = 1e-6
    slopes = np.zeros(v.size)
    for i in range(v.size):
        e = np.zeros(v.size)
        e[i] = step
        high, low = (operator(v + sign * e.reshape(v.shape), h, case.step_size) for sign in (1, -1))
        slopes[i] = ((high - low) * c).sum() / (2 * step)
    assert relative_error(backend.to_numpy(by_v).ravel(), slopes) <= 1e-7
    along = (operator(v + step * c, h, case.step_size) - operator(v - step * c, h, case.step_size)) / (2 * step)
    assert relative_error(backend.to_numpy(by_v), along) <= 1e-7
    for key, x in case.settings.items():
        x = np.asarray(x)
        ends = [[{**h, key: x + sign * step * e.reshape(x.shape)} for sign in (1, -1)] for e in np.eye(x.size)]
        values = [[operator(v, end, case.step_size) for end in pair] for pair in ends]
        expected = [((high - low) * c).sum() / (2 * step) for high, low in values]
        assert relative_error(np.ravel(backend.to_numpy(by_h[key])), expected) <= 1e-7


def _products(backend, operator, v, h, c):
    at = backend.jacobian(operator, v, h, (0.7,), label="prox")
    return at.vjp_params(c), at.vjp_hparams(c) or h
