"""What `bl.diagnose` says is true: numbers against closed forms, mistakes named, suggestions that work."""

import ast
import re
from functools import partial

import numpy as np
import pytest
from cases import quadratic
from frameworks import symmetric
from hypothesis import given
from hypothesis import strategies as st
from reports import blamed, names, words

import bilevel as bl
from bilevel import Status
from bilevel.testing import strategies

plain = partial(quadratic, hypers=2, direct=False, offset=False)


# The numbers


@given(data=st.data())
def test_no_right_formula_is_blamed(data):
    case = data.draw(strategies.quadratic_problems() | strategies.ridge_problems())
    args = {"inner_args": case.inner_args, "outer_args": case.outer_args}
    report = bl.diagnose(case.problem, case.params, case.hparams, **args)
    assert not blamed(report)
    assert not {"inner grad", "inner hvp"} & {*report.unchecked}  # others may drown in a large value
    assert report.repeatable
    assert report.derivatives.eps < 1e-15
    assert not {"wrong derivative", "not symmetric", "not repeatable", "not finite"} & {*names(report)}
    assert report.solver == bl.CG()


@given(data=st.data(), away=st.floats(0.001, 10))
def test_the_numbers_are_those_of_the_closed_form(data, away):
    case = data.draw(strategies.quadratic_problems(dtypes=st.just(np.float64)))
    H, inner, outer = case.hessian, case.problem.inner, case.problem.outer
    step = away * np.random.default_rng(0).standard_normal(case.params.shape)
    w = case.params + step
    report = bl.diagnose(case.problem, w, case.hparams, solver=bl.CG(rtol=1e-12))
    assert report.grad_norm == pytest.approx(np.linalg.norm(H @ step), rel=1e-6)
    # Neither overstated ...
    assert report.distance <= np.linalg.norm(step) / np.linalg.norm(w) * (1 + 1e-6)
    # ... nor without need: it is the step that steepest descent takes.
    g = inner.grad(w, case.hparams)
    assert report.distance == pytest.approx(np.linalg.norm(g) ** 3 / (g @ H @ g) / np.linalg.norm(w), rel=1e-6)
    eigenvalues, ends = np.linalg.eigvalsh(H), report.eigenvalues
    assert ends.smallest == pytest.approx(eigenvalues[0], rel=1e-6, abs=1e-9 * eigenvalues[-1])
    assert ends.largest == pytest.approx(eigenvalues[-1], rel=1e-6)
    assert report.value == pytest.approx(outer(w, case.hparams))
    change = -(outer.grad(w, case.hparams)[0] @ step)
    assert report.change == pytest.approx(change, rel=1e-4, abs=1e-6 * abs(change) + 1e-9)
    assert report.asymmetry <= 1e-10


def test_twenty_products_find_the_ends_of_a_large_spectrum():
    eigenvalues = np.concatenate([np.geomspace(1e-4, 10, 58), [-2.0, 20.0]])
    report = bl.diagnose(*plain(None, eigenvalues).at)
    assert report.eigenvalues.largest == pytest.approx(20, rel=1e-6)
    assert report.eigenvalues.smallest == pytest.approx(-2, rel=1e-3)


@pytest.mark.parametrize("solver", [bl.CG(), bl.MINRES(), bl.Neumann(terms=7), bl.Identity(), bl.CG(damping=2.0)])
def test_the_residual_is_the_true_one(solver):
    problem, w, lam = plain(None, np.linspace(1, 8, 20)).at
    report = bl.diagnose(problem, w, lam, solver=solver)
    v = bl.hypergradient(problem, w, lam, solver=solver).adjoint
    H, b = symmetric(np.linspace(1, 8, 20)), problem.outer.grad(w, lam)[0]
    for expected, residual in (
        (b - H @ v - report.info.damping * v, report.residual),
        (b - H @ v, report.undamped_residual),
    ):
        assert residual == pytest.approx(np.linalg.norm(expected) / np.linalg.norm(b), rel=1e-6, abs=1e-14)


def test_it_takes_few_products_and_gradients():
    problem, w, lam = plain(None, np.linspace(1, 8, 40)).at
    calls = {"grad": 0, "hvp": 0, "cross_vjp": 0}

    def counted(name):
        def call(*args):
            calls[name] += 1
            return getattr(problem.inner, name)(*args)

        return call

    def inner(*args):
        return problem.inner(*args)

    for name in calls:
        setattr(inner, name, counted(name))
    report = bl.diagnose(bl.Problem(inner, problem.outer), w, lam)
    assert report.ok
    assert calls["hvp"] - report.info.steps <= 30
    assert calls["grad"] <= 15
    assert calls["cross_vjp"] <= 4


# What it finds


class Broken:
    """An objective with some of its methods replaced."""

    def __init__(self, objective, **methods):
        self.objective, self.methods = objective, methods

    def __call__(self, *args):
        return self.objective(*args)

    def __getattr__(self, name):
        return self.methods.get(name) or getattr(self.objective, name)


def mistakes(problem):
    inner, outer = problem.inner, problem.outer
    skew = np.zeros((6, 6))
    skew[0, 1], skew[1, 0] = 1.0, -1.0
    return {
        "hvp sign": ({"hvp": lambda p, h, v: -inner.hvp(p, h, v)}, {}, "inner hvp"),
        "hvp twice": ({"hvp": lambda p, h, v: 2 * inner.hvp(p, h, v)}, {}, "inner hvp"),
        "hvp one entry": ({"hvp": lambda p, h, v: inner.hvp(p, h, v) + 0.1 * v * np.eye(1, 6, 3)[0]}, {}, "inner hvp"),
        "hvp skew": ({"hvp": lambda p, h, v: inner.hvp(p, h, v) + skew @ v}, {}, "inner hvp"),
        "cross sign": ({"cross_vjp": lambda p, h, v: -inner.cross_vjp(p, h, v)}, {}, "inner cross_vjp"),
        "cross none": ({"cross_vjp": lambda p, h, v: None}, {}, "inner cross_vjp"),
        "cross half": ({"cross_vjp": lambda p, h, v: inner.cross_vjp(p, h, v) / 2}, {}, "inner cross_vjp"),
        "outer twice": ({}, {"grad": lambda p, h: (2 * outer.grad(p, h)[0], outer.grad(p, h)[1])}, "outer grad_params"),
        "direct twice": ({}, {"grad": lambda p, h: (outer.grad(p, h)[0], np.ones(2))}, "outer grad_hparams"),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("what", mistakes(bl.problems.quadratic(np.eye(6), np.eye(6), np.ones(6))))
def test_a_mistake_in_a_formula_is_named(what, dtype):
    problem, w, lam = plain(dtype=dtype).at
    inner, outer, derivative = mistakes(problem)[what]
    broken = bl.Problem(Broken(problem.inner, **inner), Broken(problem.outer, **outer))
    report = bl.diagnose(broken, w, lam, solver=bl.CG(damping=5.0))
    assert blamed(report) == {derivative}
    assert not report.ok
    assert f"{derivative} contradicts differences of" in words(report)
    assert "> differences in float64: inner grad" in words(report)
    assert "WRONG" in words(report)
    if what == "hvp skew":
        assert report.asymmetry > 0.01


def test_a_gradient_that_is_off_by_a_factor_is_named_even_at_the_minimum():
    problem, w, lam = plain(None, np.linspace(1, 4, 6)).at
    inner = problem.inner
    doubled = {
        "grad": lambda *a: 2 * inner.grad(*a),
        "hvp": lambda *a: 2 * inner.hvp(*a),
        "cross_vjp": lambda *a: 2 * inner.cross_vjp(*a),
    }
    report = bl.diagnose(bl.Problem(Broken(inner, **doubled), problem.outer), w, lam)
    assert report.grad_norm < 1e-12
    assert blamed(report) == {"inner grad"}
    assert report.derivatives.of[0].claimed == pytest.approx(2 * report.derivatives.of[0].measured, rel=1e-6)


def test_the_leaf_that_is_wrong_is_named():
    def inner(p, h):
        return 0.5 * (p["a"] @ p["a"] + p["b"] @ p["b"]) - h @ p["a"]

    inner.grad = lambda p, h: {"a": p["a"] - h, "b": p["b"]}
    inner.hvp = lambda p, h, v: {"a": v["a"], "b": 1.1 * v["b"]}
    inner.cross_vjp = lambda p, h, v: -v["a"]

    def outer(p, h):
        return 0.5 * p["a"] @ p["a"]

    outer.grad = lambda p, h: ({"a": p["a"], "b": 0 * p["b"]}, None)
    params = {"a": np.ones(3), "b": 1e-3 * np.ones(2)}  # however small
    report = bl.diagnose(bl.Problem(inner, outer), params, np.ones(3))
    assert blamed(report) == {"inner hvp"}
    assert "worst in params['b']" in words(report)


def test_random_formulas_are_not_repeatable():
    problem, w, lam = plain(None, np.linspace(1, 4, 6)).at
    inner = problem.inner
    noisy = {"grad": lambda *args: inner.grad(*args) + 0.1 * np.random.standard_normal(6)}  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    report = bl.diagnose(bl.Problem(Broken(inner, **noisy), problem.outer), w, lam)
    assert names(report)[0] == "not repeatable"
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@pytest.mark.parametrize(("away", "found"), [(0.0, []), (1e-4, []), (0.3, ["not solved"])])
def test_being_away_from_the_minimum_is_found(away, found):
    report = bl.diagnose(*plain(None, np.linspace(1, 8, 20), away=away).at)
    assert names(report) == found
    if found:
        assert "> inner problem gradient has norm" in words(report)
        assert "Train the inner problem further" in words(report)


def test_a_maximum_is_no_minimum():
    report = bl.diagnose(*plain(None, -np.linspace(1, 8, 20), away=0.3).at)
    assert report.distance == float("inf")
    assert "not solved" in names(report)
    assert "L curves down" in words(report)
    assert "no positive curvature" in words(report)


def test_what_is_not_finite_is_said():
    problem, w, lam = plain(None, np.linspace(1, 8, 20)).at
    report = bl.diagnose(problem, w, lam * np.nan)
    assert names(report) == ["not finite"]
    assert not report.suggestions
    assert "nan or inf" in words(report)


def test_a_failed_solve_says_what_bl_hypergradient_says():
    case, undamped = plain(None, [*np.linspace(1, 8, 20), -0.1]).at, bl.CG(damping=0.0)
    report = bl.diagnose(*case, solver=undamped)
    assert report.info.status == Status.NEGATIVE_CURVATURE
    assert "solve failed" in names(report)
    assert "met non-positive curvature" in words(report)
    with pytest.warns(bl.SolverWarning, match=r"met non-positive curvature.*Run bl\.diagnose for details"):
        bl.hypergradient(*case, solver=undamped)
    diverged = bl.diagnose(*case, solver=bl.Neumann(step_size=1.0))
    assert "Neumann: diverged" in words(diverged)


def test_divergence_claims_no_negative_eigenvalue_that_only_an_error_bound_allows():
    report = bl.diagnose(*plain(None, np.geomspace(1e-8, 1.0, 60)).at, solver=bl.Neumann(terms=200, step_size=3.0))
    assert 0 < report.eigenvalues.smallest < report.eigenvalues.smallest_error
    assert "largest eigenvalue of the Hessian is about 1:" in words(report)


def test_a_direction_is_told_from_a_solution():
    case = plain(None, np.linspace(1, 8, 20)).at
    report = bl.diagnose(*case, solver="identity")
    assert names(report) == ["residual"]
    assert "Identity() stops too early" in words(report)
    assert bl.diagnose(*case, solver=bl.Neumann(terms=60)).ok


def test_a_method_that_solves_no_system_has_no_residual():
    report = bl.diagnose(*plain(None, np.linspace(1, 8, 20)).at, solver="unrolled")
    assert np.isnan(report.residual)
    assert "residual" not in words(report)
    assert report.ok


def test_a_method_that_differentiates_the_training_needs_no_minimum():
    case = plain(None, np.linspace(1, 8, 20), away=1.0).at
    assert names(bl.diagnose(*case, solver=bl.Unrolled(steps=3, step_size=0.1))) == []
    for solver in ("cg", bl.WarmStart("cg")):
        assert names(bl.diagnose(*case, solver=solver)) == ["not solved"]


# What it suggests works


def suggested(report):
    """Return the solvers that a report suggests: one to try, one if that fails, and a series."""
    text = words(report)
    solver = ast.literal_eval(re.search(r"Suggestion: solver=({.*?})", text)[1])
    damping = re.search(r"meets negative curvature, damping=([\d.e-]+\d) helps", text)
    step, series_damping = re.search(r"step_size=([\d.e-]+\d)(?: with damping=([\d.e-]+\d))?", text).groups()
    other = {**solver, "damping": float(damping[1])} if damping else solver
    return solver, other, bl.Neumann(5, float(step), float(series_damping or 0.0))


SPECTRA = {
    "even": (np.linspace(1, 8, 30), True),
    "decades": (np.geomspace(0.01, 10, 30), True),
    "ill-conditioned": (np.geomspace(1e-7, 10, 30), False),
    "slightly negative": (np.array([*np.linspace(1, 8, 30), -0.1]), True),
    "hidden": (np.array([*np.geomspace(1e-3, 10, 58), -1e-3]), False),
    "singular": (np.array([*np.geomspace(1e-3, 10, 50), 1e-12, 1e-12]), False),
    "multiple": (100 * np.ones(3), True),
}


@pytest.mark.parametrize("tried", [bl.Neumann(terms=1), bl.CG(maxiter=3), bl.CG(maxiter=1000)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_suggested_solver_solves_and_a_suggested_step_holds(name, tried):
    eigenvalues, at_once = SPECTRA[name]
    problem, w, lam = plain(None, eigenvalues).at
    report = bl.diagnose(problem, w, lam, solver=tried)
    if report.ok:
        assert report.suggestions[0].startswith("keep")
        return
    solver, other, neumann = suggested(report)

    def status(solver):
        return bl.hypergradient(problem, w, lam, solver=solver, on_failure="ignore").info.status

    assert Status.CONVERGED in ([status(solver)] if at_once else [status(solver), status(other)])
    assert status(neumann) == Status.CONVERGED or name == "hidden"
    assert neumann.step_size * (eigenvalues.max() + neumann.damping) == pytest.approx(1, abs=0.1)


def test_a_solver_that_does_its_work_is_kept():
    report = bl.diagnose(*plain(None, np.linspace(1, 8, 20)).at, solver=bl.CG(maxiter=50))
    assert report.ok
    assert report.suggestions[0].startswith("keep CG(maxiter=50)")
    assert "no errors were found" in words(report)


def test_strong_negative_curvature_is_not_damped_away():
    report = bl.diagnose(*plain(None, [*np.linspace(1, 8, 20), -5.0]).at)
    assert "is not small against the positive" in report.suggestions[0]


# Every framework


def test_every_framework_says_the_same(backend):
    away = plain(None, [*np.linspace(1, 8, 20), -0.3], away=0.2).at
    there = plain(backend, [*np.linspace(1, 8, 20), -0.3], away=0.2).at
    expected, report = bl.diagnose(*away), bl.diagnose(*there)
    assert names(report) == names(expected) == ["not solved", "negative curvature"]
    assert report.verified
    for field in ("grad_norm", "distance", "value", "residual"):
        assert getattr(report, field) == pytest.approx(getattr(expected, field), rel=1e-6), field
    assert report.eigenvalues.largest == pytest.approx(8, rel=1e-6)
    assert report.eigenvalues.smallest == pytest.approx(-0.3, rel=1e-2)


def test_batches_are_looked_at_by_their_first(backend):
    rng = np.random.default_rng(0)
    batches = [tuple(backend.from_numpy(rng.standard_normal(shape)) for shape in ((12, 3), (12,))) for _ in range(3)]
    w, lam = backend.from_numpy(np.zeros(3)), backend.from_numpy(np.zeros(3))
    report = bl.diagnose(bl.problems.ridge(), w, lam, inner_args=batches, outer_args=batches[0], solver="neumann")
    assert report.verified
    assert np.isnan(report.residual)


def test_input_that_does_not_fit_is_refused(backend):
    case = plain(backend, np.ones(2)).at
    with pytest.raises(ValueError, match="there is no 'cgg'"):
        bl.diagnose(*case, solver="cgg")
    with pytest.raises(TypeError, match="inner_args"):
        bl.diagnose(*case, inner_args=3)
    with pytest.raises(TypeError, match="floating-point"):
        bl.diagnose(case[0], backend.from_numpy(np.ones(2, int)), case[2])
