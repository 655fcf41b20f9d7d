"""Constrained problems: against differences of re-solved problems, closed forms and projections."""

import warnings
from functools import cache

import numpy as np
import pytest
from constrained_cases import SIZE, Distance, InBalls, Pull, SquaredNorm, nonlinear, point, program, slopes
from frameworks import moved, relative_error

import bilevel as bl
from bilevel.testing import check_hypergradient

CASES = {
    "quadratic program": program,
    "inequalities": lambda: (nonlinear(equality=False), point()),
    "equalities": lambda: (nonlinear(inequality=False), point()),
    "both": lambda: (nonlinear(), point()),
}
START = {"w": np.full(SIZE, 0.1)}


@cache
def solved(name):
    problem, hparams = CASES[name]()
    fit = bl.constrained_fit(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = fit(hparams, START)
    return problem, hparams, params, slopes(problem, fit, hparams, params)


def hypergradient(*args, **options):
    with warnings.catch_warnings():  # "sum" or "radius" has no influence in some cases
        warnings.simplefilter("ignore", bl.DependenceWarning)
        return bl.hypergradient(*args, **options)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_slope_of_the_solved_problem(backend, name):
    problem, hparams, params, expected = solved(name)
    if backend.name == "jax" and name in ("inequalities", "equalities"):
        pytest.skip("JAX compiles each case; the case with both is compared")
    hg = hypergradient(problem, moved(backend, params), moved(backend, hparams), solver=bl.MINRES(rtol=1e-12))
    assert hg.info.status is bl.Status.CONVERGED
    assert hg.info.kinks == 0
    assert abs(hg.info.value_error) <= 1e-12
    for key, slope in expected.items():
        assert np.abs(backend.to_numpy(hg.grad[key]) - slope).max() <= 1e-6 * max(1, np.abs(slope).max()), key


def test_some_inequalities_are_active_and_some_are_not():
    for name in ("quadratic program", "inequalities", "both"):
        problem, hparams, params, _ = solved(name)
        active = params["inequality"] > 0
        assert 0 < active.sum() < active.size
        values = problem.inequality(params["w"], hparams)
        np.testing.assert_allclose(values[active], 0, atol=1e-12)
        assert (values[~active] < -0.01).all()
        assert (params["inequality"][~active] == 0).all()


def test_every_solver_for_indefinite_systems_agrees():
    problem, hparams, params, expected = solved("both")
    for solver in (
        bl.MINRES(rtol=1e-12),
        bl.GMRES(rtol=1e-12),
        bl.BiCGStab(rtol=1e-12),
        bl.NormalCG(rtol=1e-12),
        bl.Exact(),
    ):
        hg = bl.hypergradient(problem, params, hparams, solver=solver)
        assert relative_error(hg.grad["center"], expected["center"]) <= 1e-6, solver


def test_float32(backend):
    problem, hparams, params, expected = solved("both")
    inputs = [
        {key: backend.from_numpy(np.asarray(x, np.float32)) for key, x in tree.items()} for tree in (params, hparams)
    ]
    hg = bl.hypergradient(problem, *inputs, solver="minres")
    assert hg.grad["center"].dtype == inputs[1]["center"].dtype
    assert hg.info.kinks == 0
    assert relative_error(backend.to_numpy(hg.grad["center"]), expected["center"]) <= 1e-4


def test_bounds_agree_with_a_projection():
    """The same problem by `bl.Projected`, whose system has no multipliers."""
    rng = np.random.default_rng(3)
    factor, q = rng.standard_normal((SIZE, SIZE)), rng.standard_normal(SIZE)
    Q = factor @ factor.T + np.eye(SIZE)
    bounded = bl.problems.quadratic_program(SquaredNorm(), Q=Q, q="q", G=-np.eye(SIZE), h=np.zeros(SIZE))
    params = bl.constrained_fit(bounded)({"q": q}, {"w": np.ones(SIZE)})
    hg = bl.hypergradient(bounded, params, {"q": q}, solver="exact")
    smooth = bl.problems.quadratic(Q, -np.eye(SIZE), np.zeros(SIZE))
    projected = bl.Projected(smooth.inner, bl.projections.nonnegative(), smooth.outer)
    w = bl.proximal_fit(projected, gtol=1e-12)(q, np.ones(SIZE))
    np.testing.assert_allclose(params["w"], w, atol=1e-10)
    expected = bl.hypergradient(projected, w, q, solver="exact").grad
    np.testing.assert_allclose(hg.grad["q"], expected, atol=1e-10)
    assert 0 < (params["inequality"] > 0).sum() < SIZE


def test_a_vertex_of_a_linear_program_moves_with_its_constraints():
    """w* solves the active rows G w = h, so dF/dh = G⁻ᵀ w*, with multipliers and a Hessian of zero."""
    G, q = np.array([[1.0, 1.0], [1.0, -2.0], [-1.0, 0.0]]), np.array([-2.0, -1.0])
    problem = bl.problems.quadratic_program(SquaredNorm(), Q=0.0, q=q, G=G, h="h")
    h = np.array([2.0, 1.0, 5.0])
    w = np.linalg.solve(G[:2], h[:2])
    params = bl.with_multipliers(problem, w, {"h": h})
    np.testing.assert_allclose(params["inequality"], [*np.linalg.solve(G[:2].T, -q), 0], atol=1e-12)
    hg = bl.hypergradient(problem, params, {"h": h}, solver="exact")
    np.testing.assert_allclose(hg.grad["h"], [*np.linalg.solve(G[:2].T, w), 0], atol=1e-12)


def at_a_kink():
    """w* = max(q, 0) at q = 0 in its first entry: w ≥ 0 neither holds it nor leaves it free."""
    problem = bl.problems.quadratic_program(SquaredNorm(), Q=np.eye(2), q="q", G=-np.eye(2), h=[0.0, 0.0])
    return problem, {"w": np.array([0.0, 1.0]), "inequality": np.zeros(2)}, {"q": np.array([0.0, -1.0])}


def test_an_inequality_without_strict_complementarity_is_reported(backend):
    problem, params, hparams = at_a_kink()
    args = moved(backend, params), moved(backend, hparams)
    with pytest.warns(bl.InnerProblemWarning, match="or of an inequality"):
        hg = bl.hypergradient(problem, *args, solver="minres")
    assert hg.info.kinks == 1
    if backend.name == "numpy":
        report = bl.diagnose(problem, *args, solver="minres")
        assert [f.name for f in report.findings] == ["at kink"]
        assert "params['inequality'][0]" in report.findings[0].what


def test_diagnose_finds_nothing_at_a_regular_solution():
    problem, hparams, params, _ = solved("both")
    assert bl.diagnose(problem, params, hparams, solver="minres").ok


def test_wrong_params_raise_a_warning():
    problem, hparams, params, _ = solved("both")
    for wrong in ({"inequality": -params["inequality"]}, {"equality": -params["equality"]}, {"w": 1.5 * params["w"]}):
        with pytest.warns(bl.InnerProblemWarning, match=r"KKT conditions.*bl\.with_multipliers"):
            bl.hypergradient(problem, {**params, **wrong}, hparams, solver="minres")
        with pytest.warns(bl.InnerProblemWarning, match="KKT conditions"):
            bl.hypergradients(problem, {**params, **wrong}, hparams, outer_args=[(), ()], solver="minres")


def test_all_queries_share_one_problem():
    problem, hparams, params, _ = solved("both")
    one = bl.hypergradient(problem, params, hparams, solver=bl.MINRES(rtol=1e-12)).grad
    hgs = bl.hypergradients(problem, params, hparams, outer_args=[(), ()], solver=bl.MINRES(rtol=1e-12))
    for row in range(2):
        np.testing.assert_allclose(hgs.grad["center"][row], one["center"], rtol=1e-8)


def test_check_hypergradient_accepts_it():
    problem, hparams = program(keys=("b",))
    fit = bl.constrained_fit(problem)
    check_hypergradient(problem, fit(hparams, START), hparams, solver="minres", reference="retraining", fit=fit)


def test_problems_of_equal_functions_are_equal():
    assert program()[0].inequality == program()[0].inequality
    objective, outer, inequality = Pull(), Distance(), InBalls()
    one, other = (bl.Constrained(objective, outer, inequality=inequality) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize("solver", ["cg", "neumann", "nystrom"])
def test_solvers_for_definite_systems_raise(solver):
    problem, hparams, params, _ = solved("both")
    with pytest.raises(TypeError, match=r"eigenvalues of both signs\. Use solver=\"minres\""):
        bl.hypergradient(problem, params, hparams, solver=solver)


@pytest.mark.parametrize("solver", [bl.MINRES(damping="auto"), bl.GMRES(damping=0.5), bl.Exact(damping=1e-3)], ids=str)
def test_damping_raises(solver):
    """It would change the constraints: for Σw = 1 and F = |w|², dF/dq is 0 at q = (1, 1), and not 0.4."""
    problem, hparams, params, _ = solved("both")
    with pytest.raises(ValueError, match=r"^damping: expected 0 for a bl\.Constrained, got .*add a penalty to it"):
        bl.hypergradient(problem, params, hparams, solver=solver)


def test_an_unroll_raises():
    problem, hparams, params, _ = solved("both")
    with pytest.raises(TypeError, match="saddle point of its Lagrangian"):
        bl.hypergradient(problem, params, hparams, solver="unrolled")


def test_wrong_arguments_raise():
    with pytest.raises(TypeError, match=r"expected equality or inequality.*bl\.Problem"):
        bl.Constrained(Pull(), Distance())
    with pytest.raises(TypeError, match=r"Constrained\.inequality: expected a function"):
        bl.Constrained(Pull(), Distance(), inequality=3)
    problem, hparams, params, _ = solved("both")
    for wrong in (params["w"], {"w": params["w"]}):
        with pytest.raises(ValueError, match=r"expected a dict with .*bl\.with_multipliers"):
            bl.hypergradient(problem, wrong, hparams, solver="minres")
    with pytest.raises(
        ValueError, match=r"params\['inequality'\]: expected one multiplier .* \(2,\).*got the shape \(3,\)"
    ):
        bl.hypergradient(problem, {**params, "inequality": np.zeros(3)}, hparams, solver="minres")
    batches = bl.MicroBatches([(1,)])
    with pytest.raises(TypeError, match=r"takes no bl\.MicroBatches"):
        bl.hypergradient(problem, params, hparams, inner_args=batches, solver="minres")

    without = bl.Constrained(Pull(), Distance(), inequality=lambda w, h: w)
    with pytest.raises(TypeError, match=r"has no method 'vjp_params'.*Constraint"):
        bl.hypergradient(without, {"w": START["w"], "inequality": START["w"]}, hparams, solver="minres")


def test_wrong_quadratic_programs_raise():
    with pytest.raises(TypeError, match="A and b belong together"):
        bl.problems.quadratic_program(SquaredNorm(), Q=np.eye(2), A=np.ones((1, 2)))
    problem, hparams = program()
    with pytest.raises(ValueError, match=r"q is hparams\['q'\], but hparams has the keys \['A', 'G', 'Q'"):
        bl.constrained_fit(problem)({key: x for key, x in hparams.items() if key != "q"}, START)
    with pytest.raises(ValueError, match=r"expected A of shape \(1, 4\), got \(1, 5\)"):
        bl.constrained_fit(problem)({**hparams, "A": np.ones((1, 5))}, START)
    with pytest.raises(ValueError, match=r"w has 4 entries, so expected Q of shape \(4, 4\), got \(3, 3\)"):
        bl.constrained_fit(problem)({**hparams, "Q": np.eye(3)}, START)
    with pytest.raises(ValueError, match=r"w has 4 entries, so expected q of shape \(4,\), got \(\)"):
        bl.constrained_fit(problem)({**hparams, "q": np.array(1.0)}, START)
    with pytest.raises(ValueError, match=r"Q is the number 2\. Pass a matrix, or 0\.0 for a linear program"):
        bl.problems.quadratic_program(SquaredNorm(), Q=2.0, G=-np.eye(4), h=np.zeros(4))
