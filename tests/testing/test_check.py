"""The references are right, their noise is honest, and the check rejects what is wrong and says how."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cases import equation, quadratic, ridge
from frameworks import framework, namespace, relative_error, tolerance
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bilevel as bl
from bilevel.methods import Implicit, Method
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.testing import check_hypergradient, exact_hypergradient, finite_difference_hypergradient, strategies
from bilevel.testing.difference_reference import slope
from bilevel.testing.wording import relation

CASES = {
    "quadratic": strategies.quadratic_problems(),
    "indefinite": strategies.quadratic_problems(indefinite=True),
    "ridge": strategies.ridge_problems(),
}
cases = pytest.mark.parametrize("kind", CASES)
autodiff = pytest.mark.parametrize("name", ["torch", "jax"])
SHARP = {"name": "cg", "rtol": 1e-10}
DIFFERENCES: Any = "finite-differences"


def data_of(case):
    return {"inner_args": case.inner_args, "outer_args": case.outer_args}


def tanh_net(backend, dtype=np.float64):
    """A small network whose penalties and labels are hyperparameters: problem, params, hparams, and its data."""
    xp, rng = namespace(backend), np.random.default_rng(0)
    x, x_val = rng.standard_normal((2, 20, 3))
    params = {"a": 0.5 * rng.standard_normal((3, 2)), "b": [np.zeros(2), 0.5 * rng.standard_normal(2)]}
    hparams = {"decay": rng.uniform(-3, -2, 3), "label": 0.1 * rng.standard_normal(4)}

    def net(p, x):
        return xp.tanh(x @ p["a"] + p["b"][0]) @ p["b"][1]

    def inner(p, h, x, y):
        weights = (p["a"], *p["b"])
        penalty = sum((xp.exp(h["decay"][i]) * w**2).sum() for i, w in enumerate(weights))
        return ((net(p, x) - y) ** 2).mean() + ((net(p, x[:4]) - h["label"]) ** 2).mean() + penalty

    def outer(p, h, x, y):
        return ((net(p, x) - y) ** 2).mean() + 0.1 * (h["decay"] ** 2).sum()

    def convert(tree):
        return tree_map(lambda leaf: backend.from_numpy(leaf.astype(dtype)), tree)

    data = {"inner_args": convert((x, np.sin(x.sum(1)))), "outer_args": convert((x_val, np.sin(x_val.sum(1))))}
    return bl.Problem(inner, outer), convert(params), convert(hparams), data


@functools.cache  # compiled once, in JAX
def solved_net(name, dtype=np.float64):
    """The network with its inner problem solved, and its hypergradient by finite differences."""
    pytest.importorskip(name)
    problem, params, hparams, data = tanh_net(framework(name), dtype)
    measured = finite_difference_hypergradient(problem, params, hparams, **data)
    return problem, measured.params, hparams, data, measured


def flat(backend, tree):
    return backend.to_flat(tree)


def failure(*args, **options) -> str:
    with pytest.raises(AssertionError) as caught:
        check_hypergradient(*args, **options)
    return " ".join(str(caught.value).split())


# The references


@cases
@settings(max_examples=5)  # a compilation each, in JAX
@given(data=st.data())
def test_exact_reference_matches_the_closed_form(backend, kind, data):
    case = data.draw(CASES[kind])
    there = case.to(backend)
    hg = exact_hypergradient(there.problem, there.params, there.hparams, **data_of(there))
    rtol = tolerance(case.params.dtype, case.condition)
    assume(rtol < 0.1)
    assert relative_error(flat(backend, hg.adjoint), case.adjoint) < rtol
    scale = np.linalg.norm(case.grad) + np.linalg.norm(case.adjoint)
    assert np.linalg.norm(flat(backend, hg.grad) - case.grad.ravel()) < rtol * scale
    assert hg.info.status == bl.Status.CONVERGED
    assert backend.to_numpy(hg.grad).dtype == case.params.dtype
    assert backend.to_numpy(hg.grad).shape == case.hparams.shape


@cases
@given(data=st.data())
def test_finite_differences_match_the_closed_form_to_their_noise(kind, data):
    case = data.draw(CASES[kind])
    hg = finite_difference_hypergradient(case.problem, case.params, case.hparams, **data_of(case))
    # The closed form is taken at params, rounded; a rounding that the differences do not see.
    rounding = tolerance(case.params.dtype, case.condition, 10) * (
        np.linalg.norm(case.grad) + np.linalg.norm(case.adjoint)
    )
    assert np.linalg.norm(hg.grad - case.grad) <= hg.info.residual_norm + rounding
    assert hg.grad.dtype == case.params.dtype


@given(strategies.ridge_problems(dtypes=st.just(np.float64)))
def test_finite_differences_find_the_minimizer_from_afar(case):
    far = case.params + 10
    hg = finite_difference_hypergradient(case.problem, far, case.hparams, **data_of(case))
    assert relative_error(hg.params, case.params) < tolerance(np.float64, case.condition)
    assert hg.value == pytest.approx(case.problem.outer(case.params, case.hparams, *case.outer_args))
    assert hg.adjoint is None


@autodiff
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_references_agree_on_a_nonconvex_network(name, dtype):
    problem, params, hparams, data, measured = solved_net(name, dtype)
    backend, exact = framework(name), exact_hypergradient(problem, params, hparams, **data)
    error = np.linalg.norm(flat(backend, measured.grad) - flat(backend, exact.grad))
    assert error <= measured.info.residual_norm
    assert measured.info.residual_norm < 1e4 * np.finfo(dtype).eps ** (2 / 3) * measured.info.rhs_norm
    for _, leaf in leaves_with_paths((measured.grad, exact.grad)):
        assert backend.to_numpy(leaf).dtype == dtype


@given(st.floats(-3, 3), st.floats(0.01, 100), st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-10, 1e-6]))
def test_noise_of_a_slope_covers_its_error(phase, frequency, offset, scatter):
    def function(t):
        noise = scatter * np.sin(1e9 * t + phase)  # scatter at any step that the sweep takes
        return float(np.sin(frequency * t + phase) + offset + noise)

    value, noise = slope(function, 1 / frequency, np.finfo(np.float64).eps)
    assert abs(value - frequency * np.cos(phase)) <= 2 * noise
    assert noise <= 20 * (scatter + 1e-15 * (1 + abs(offset))) ** (2 / 3) * frequency


def test_finite_differences_leave_out_steps_that_reach_where_the_objective_is_not_defined():
    class Root:
        def __call__(self, params, hparams):
            return 0.5 * (params - np.sqrt(hparams)) @ (params - np.sqrt(hparams))

        def grad(self, params, hparams):
            return params - np.sqrt(hparams)

        def hvp(self, params, hparams, vector):
            return vector

        def cross_vjp(self, params, hparams, vector):
            return -0.5 / np.sqrt(hparams) * vector

    target = bl.problems.quadratic(np.eye(2), np.eye(2), np.zeros(2)).outer  # ½ ‖√λ‖², of slope ½
    hparams = np.array([1e-3, 4.0])
    hg = finite_difference_hypergradient(bl.Problem(Root(), target), np.sqrt(hparams), hparams)
    np.testing.assert_allclose(hg.grad, 0.5, rtol=1e-6)


# What the check accepts


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_check_accepts_a_right_hypergradient(backend, reference):
    case = ridge(backend)
    check_hypergradient(*case.at, reference=reference, **case.args)


@autodiff
@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_check_accepts_a_network_with_nested_trees(name, reference):
    problem, solved, hparams, data, _ = solved_net(name)
    check_hypergradient(problem, solved, hparams, solver=SHARP, reference=reference, **data)


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_check_judges_an_unroll_where_it_ends(reference):
    problem, params, lam = quadratic().at
    check_hypergradient(problem, params + 1, lam, solver={"name": "unrolled", "steps": 500}, reference=reference)


def test_check_accepts_a_zero_hypergradient():
    problem, params, lam = quadratic(direct=False).at
    at_minimum = dataclasses.replace(problem.outer, target=params)
    check_hypergradient(bl.Problem(problem.inner, at_minimum), params, lam, reference=DIFFERENCES)


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_check_accepts_what_cancels_at_a_tuned_point(reference):
    problem, params, lam = quadratic(direct=False).at
    implicit_term = exact_hypergradient(problem, params, lam).grad
    tuned = dataclasses.replace(problem.outer, direct=-implicit_term)
    check_hypergradient(bl.Problem(problem.inner, tuned), params, lam, solver="cg", reference=reference)


def test_a_zero_reference_is_compared_without_a_division_by_zero():
    problem, params, lam = quadratic(direct=False).at
    at_minimum = bl.Problem(problem.inner, dataclasses.replace(problem.outer, target=params))

    @dataclasses.dataclass(frozen=True)
    class Ones(bl.LinearSolver):
        def solve(self, state, A, b, x0):
            return np.ones_like(b), bl.CG().solve(None, A, b, x0)[1]

    assert " inf " in failure(at_minimum, params, lam, solver=Ones(), rtol=0, atol=0)


@given(strategies.quadratic_problems(max_condition=100.0))
def test_default_tolerances_accept_cg_on_well_conditioned_problems(case):
    check_hypergradient(case.problem, case.params, case.hparams, reference="exact")
    if case.params.dtype == np.float64:  # in float32, what cancels may drown in the noise, which is an error
        check_hypergradient(case.problem, case.params, case.hparams, reference=DIFFERENCES)


# What the check rejects


class Broken:
    """An objective, some of whose derivatives are replaced."""

    def __init__(self, objective, **replaced):
        self.objective = objective
        vars(self).update(replaced)

    def __call__(self, *args):
        return self.objective(*args)

    def __getattr__(self, name):
        return getattr(self.objective, name)


def broken(problem, what):
    inner, outer = problem.inner, problem.outer

    def direct(factor):
        return lambda p, h: (outer.grad(p, h)[0], None if factor is None else factor * outer.grad(p, h)[1])

    replaced = {
        "cross sign": {"cross_vjp": lambda *args: -inner.cross_vjp(*args)},
        "cross twice": {"cross_vjp": lambda *args: 2 * inner.cross_vjp(*args)},
        "cross transposed": {"cross_vjp": lambda p, h, v: -inner.coupling @ v},
        "cross zero": {"cross_vjp": lambda p, h, v: 0 * h},
        "hvp half": {"hvp": lambda *args: 0.5 * inner.hvp(*args)},
        "hvp sign": {"hvp": lambda *args: -inner.hvp(*args)},
        "inner grad": {"grad": lambda p, h: 3 * inner.grad(p, h)},
        "direct dropped": {"grad": direct(None)},
        "direct sign": {"grad": direct(-1)},
        "direct twice": {"grad": direct(2)},
        "rhs twice": {"grad": lambda p, h: (2 * outer.grad(p, h)[0], outer.grad(p, h)[1])},
    }[what]
    if what.startswith(("direct", "rhs")):
        return bl.Problem(inner, Broken(outer, **replaced))
    return bl.Problem(Broken(inner, **replaced), outer)


IMPLICIT = "The implicit term −(∂²L/∂λ∂w)ᵀ v"


@pytest.mark.parametrize(
    ("what", "direct", "sentence", "derivative"),
    [
        ("cross sign", False, "They differ by the sign.", "inner cross_vjp"),
        ("cross sign", True, f"{IMPLICIT} has the wrong sign; ∂F/∂λ is right.", "inner cross_vjp"),
        ("cross twice", False, "They differ by a factor of 2.00", "inner cross_vjp"),
        ("cross twice", True, f"{IMPLICIT} is off by a factor of 2.00", "inner cross_vjp"),
        ("cross transposed", True, "They differ neither by the sign, nor by a factor", "inner cross_vjp"),
        ("cross zero", False, "The hypergradient is zero.", "inner cross_vjp"),
        ("cross zero", True, f"{IMPLICIT} is missing: there is only ∂F/∂λ.", "inner cross_vjp"),
        ("hvp half", False, "They differ by a factor of 2.00", "inner hvp"),
        ("hvp sign", True, "The solver found a damping of", "inner hvp"),
        ("inner grad", True, "there is no reference", "inner grad"),
        ("direct dropped", True, "The direct term ∂F/∂λ is missing: the difference equals it.", "outer grad_hparams"),
        ("direct sign", True, "The direct term ∂F/∂λ has the wrong sign.", "outer grad_hparams"),
        ("direct twice", True, "The direct term ∂F/∂λ is counted twice", "outer grad_hparams"),
        ("rhs twice", False, "They differ by a factor of 2.00", "outer grad_params"),
    ],
)
def test_differences_reject_a_wrong_derivative_and_name_it(what, direct, sentence, derivative):
    problem, params, lam = quadratic(hypers=6, direct=direct).at
    check_hypergradient(problem, params, lam, solver=SHARP, reference=DIFFERENCES)
    message = failure(broken(problem, what), params, lam, solver=SHARP, reference=DIFFERENCES)
    assert sentence in message
    contradicted = {name for name in WORDS if f"{name} contradicts differences of" in message}
    assert contradicted == {derivative}


WORDS = ("inner grad", "inner hvp", "inner cross_vjp", "outer grad_params", "outer grad_hparams")


@pytest.mark.parametrize(
    ("name", "what"), [("torch", "sign"), ("torch", "twice"), ("torch", "direct dropped"), ("jax", "sign")]
)
def test_differences_reject_a_wrong_backend(name, what):
    problem, solved, hparams, data, _ = solved_net(name)
    right = framework(name)

    class Wrong(type(right)):
        def inner(self, *args):
            inner, factor = super().inner(*args), {"sign": -1.0, "twice": 2.0}.get(what, 1.0)
            of_hparams = self.space(args[2])
            return inner._replace(vjp_hparams=lambda v: of_hparams.scale(factor, inner.vjp_hparams(v)))

        def outer(self, *args, **options):
            outer = super().outer(*args, **options)
            return outer._replace(grad_hparams=None) if what == "direct dropped" else outer

    options = {"solver": SHARP, "reference": DIFFERENCES, **data}
    message = failure(problem, solved, hparams, backend=Wrong(), **options)
    expected = {
        "sign": f"{IMPLICIT} has the wrong sign",
        "twice": f"{IMPLICIT} is off by a factor of 2.00",
        "direct dropped": "The direct term ∂F/∂λ is missing",
    }
    assert expected[what] in message


@dataclasses.dataclass(frozen=True)
class WrongSolver(bl.LinearSolver):
    """CG, its answer multiplied."""

    factor: float

    def solve(self, state, A, b, x0):
        x, info = bl.CG(rtol=1e-10).solve(None, A, b, x0)
        return A.space.scale(self.factor, x), info


@dataclasses.dataclass(frozen=True)
class WrongLeaf(Method):
    """CG, the sign of one leaf of the indirect term flipped."""

    leaf: str

    def explain(self, info, symmetric, curvature):
        return "failed"

    def solve(self, level, adjoint0):
        right = Implicit(bl.CG(rtol=1e-10)).solve(level, adjoint0)

        def pullback(cotangent):
            pulled = right.pullback(cotangent)
            return pulled._replace(hparams={**pulled.hparams, self.leaf: -pulled.hparams[self.leaf]})

        return right._replace(pullback=pullback)


@pytest.mark.parametrize(
    ("factor", "sentence"), [(-1.0, "They differ by the sign."), (2.0, "They differ by a factor of 2.00")]
)
def test_exact_rejects_a_wrong_solver(backend, factor, sentence):
    case = ridge(backend)
    message = failure(*case.at, solver=WrongSolver(factor), **case.args)
    assert sentence in message
    assert "leaf ‖hypergradient‖ ‖exact‖ relative error cosine worst entry > hparams" in message
    assert f" {np.sign(factor):.4f} [" in message  # the cosine


@autodiff
@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_the_table_marks_the_leaf_that_is_wrong(name, reference):
    problem, solved, hparams, data, _ = solved_net(name)
    message = failure(problem, solved, hparams, solver=WrongLeaf("label"), reference=reference, **data)
    assert "They differ by the sign." in message
    assert "> hparams['label']" in message or "> random in hparams['label']" in message
    assert "> hparams['decay']" not in message
    assert "> random in hparams['decay']" not in message


def test_a_truncated_solver_is_rejected_unless_rtol_allows_for_it():
    problem, params, lam = quadratic().at
    short = {"name": "neumann", "terms": 5}
    assert "The solve is far from complete" in failure(problem, params, lam, solver=short)
    check_hypergradient(problem, params, lam, solver=short, rtol=0.5)


def test_a_loose_solve_is_told_from_a_wrong_one():
    problem, params, lam = quadratic().at
    message = failure(problem, params, lam, solver={"name": "cg", "rtol": 1e-2}, rtol=1e-9)
    assert "Raise maxiter" not in message
    assert "The solve is far from complete" in message


def test_params_that_are_no_minimizer_explain_the_difference():
    problem, params, lam = quadratic().at
    check_hypergradient(problem, params + 0.1, lam, solver=SHARP)
    message = failure(problem, params + 0.1, lam, solver=SHARP, reference=DIFFERENCES)
    assert "params is not the minimizer of the inner objective" in message
    assert "The inner gradient at params: norm" in message


def test_nan_is_rejected():
    problem, params, lam = quadratic().at
    grad = Broken(problem.outer, grad=lambda p, h: (p, np.full_like(h, np.nan)))
    for reference in ("exact", "finite-differences"):
        message = failure(bl.Problem(problem.inner, grad), params, lam, reference=reference)
        assert "The hypergradient has entries that are nan or infinite." in message


def test_noise_that_hides_the_answer_is_no_pass():
    problem, params, lam = quadratic().at
    outer = Broken(problem.outer)
    shaky = type(
        "Shaky", (Broken,), {"__call__": lambda self, p, h: self.objective(p, h) + 1e4 * np.sin(1e9 * p.sum())}
    )
    message = failure(bl.Problem(problem.inner, shaky(outer)), params, lam, reference=DIFFERENCES)
    assert "too noisy for a comparison" in message


# Damping


REFERENCES = {"exact": exact_hypergradient, "finite-differences": finite_difference_hypergradient}


@pytest.mark.parametrize("away", [0.0, 0.5])
@pytest.mark.parametrize("reference", REFERENCES)
def test_a_damped_reference_matches_the_closed_form(backend, reference, away):
    """Also at params that are no minimum, and with negative curvature."""
    case = quadratic(backend, np.array([-0.5, 1.0, 2.0, 4.0]), hypers=3, away=away)
    w = backend.to_numpy(case.params)
    adjoint = np.linalg.solve(case.matrix + 2.0 * np.eye(4), w - case.target)
    expected = case.direct + case.coupling.T @ adjoint
    hg = REFERENCES[reference](*case.at, damping=2.0)
    assert relative_error(backend.to_numpy(hg.grad), expected) < 1e-6
    check_hypergradient(*case.at, solver=bl.CG(damping=2.0, rtol=1e-10), reference=reference, damping=2.0)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_damped_reference_of_an_equation(reference):
    case = equation("root", away=0.3)
    damped = {"name": "gmres", "rtol": 1e-10, "damping": 0.5}
    check_hypergradient(*case.at, **case.args, solver=damped, reference=reference, damping=0.5)
    message = failure(*case.at, **case.args, solver=damped, reference="exact")
    assert "The solver has a damping of 0.5, but the reference has 0. Pass damping=0.5" in message


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_damped_solve_of_an_untrained_network(reference):
    """Its Hessian is singular, so only the damped system has a solution."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()

    def losses(p, x):
        return (torch.func.functional_call(net, p, (x,)) - y).square()[:, 0]

    problem = bl.Problem(lambda p, h: (h.exp() * losses(p, x)).mean(), lambda p, h: losses(p, x + 1).mean())
    params, h = {name: p.detach() for name, p in net.named_parameters()}, torch.zeros(20).double()
    solver = bl.CG(damping=5.0, rtol=1e-10)
    check_hypergradient(problem, params, h, solver=solver, reference=reference, damping=5.0)
    assert "CG(rtol=1e-10, damping=5.0)" in failure(problem, params, h, solver=solver, reference=reference, damping=4.0)


def test_a_damping_that_is_no_number_from_zero_on_is_refused():
    case = quadratic()
    for call in (check_hypergradient, *REFERENCES.values()):
        for damping in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="damping: expected a finite number >= 0"):
                call(*case.at, damping=damping)


# Retraining


class TestRetraining:
    """The user's training takes the place of Newton's method."""

    def at(self, backend, error=0.0, follows=True):
        case, calls = ridge(backend), []
        X, y = (backend.to_numpy(x) for x in case.args["inner_args"])
        rng = np.random.default_rng(0)

        def fit(hparams, params0):
            calls.append(1)
            lam = backend.to_numpy(hparams if follows else case.hparams)
            w = np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(lam)), X.T @ y / len(y))
            return backend.from_numpy(w + error * rng.standard_normal(w.shape))

        return case, {**case.args, "fit": fit, "reference": "retraining"}, calls

    def test_it_agrees(self, backend):
        case, options, calls = self.at(backend)
        check_hypergradient(*case.at, **options)
        assert len(calls) <= 1 + 15 * 4
        hg = finite_difference_hypergradient(*case.at, **case.args, fit=options["fit"])
        assert relative_error(backend.to_numpy(hg.grad), case.grad) < 1e-4

    def test_a_wrong_hypergradient_is_found(self):
        case, options, _ = self.at(framework("numpy"))
        inner = Broken(case.problem.inner, cross_vjp=lambda *args: 2 * case.problem.inner.cross_vjp(*args))
        message = failure(bl.Problem(inner, case.problem.outer), *case.at[1:], **options)
        assert "differs from finite differences of the retrained problem" in message
        assert "factor of 2.00" in message

    def test_other_params_than_those_of_the_training_are_told(self):
        case, options, _ = self.at(framework("numpy"))
        message = failure(case.problem, case.params + 0.1, case.hparams, **options)
        assert "params is not the result of fit: at the retrained params, the hypergradient agrees" in message

    def test_a_training_with_too_much_noise_is_no_reference(self):
        case, options, _ = self.at(framework("numpy"), error=0.05)
        assert "train more exactly, with a fixed seed" in failure(*case.at, **options)

    def test_a_training_that_ignores_its_hyperparameters_is_told(self):
        case, options, _ = self.at(framework("numpy"), follows=False)
        assert "fit returns the same params for other hyperparameters" in failure(*case.at, **options)

    def test_arguments_that_do_not_fit_are_refused(self):
        case, options, _ = self.at(framework("numpy"))
        with pytest.raises(ValueError, match=r'pass fit= and reference="retraining" together'):
            check_hypergradient(*case.at, **{**options, "reference": "exact"})
        with pytest.raises(ValueError, match=r'pass fit= and reference="retraining" together'):
            check_hypergradient(*case.at, **{**options, "fit": None})
        with pytest.raises(ValueError, match="a training solves the inner problem without damping"):
            check_hypergradient(*case.at, **options, damping=1.0)
        with pytest.raises(TypeError, match="fit: expected a function"):
            check_hypergradient(*case.at, **{**options, "fit": 3})
        with pytest.raises(TypeError, match=r"fit returned None\. Return the params\."):
            check_hypergradient(*case.at, **{**options, "fit": lambda h, w: None})
        with pytest.raises(ValueError, match="the result of fit: expected the structure of params"):
            check_hypergradient(*case.at, **{**options, "fit": lambda h, w: np.ones(2)})


# Bad input


def test_an_unknown_reference_gets_the_options():
    problem, params, lam = quadratic().at
    with pytest.raises(
        ValueError,
        match=r'expected "exact", "finite-differences" or "retraining", got .exactt.\. Did you mean "exact"\?',
    ):
        check_hypergradient(problem, params, lam, reference="exactt")  # pyright: ignore


@pytest.mark.parametrize("option", ["rtol", "atol"])
def test_a_negative_tolerance_is_refused(option):
    problem, params, lam = quadratic().at
    with pytest.raises(ValueError, match=f"{option}: expected a number >= 0, got -1"):
        check_hypergradient(problem, params, lam, **{option: -1})


@pytest.mark.parametrize("reference", [exact_hypergradient, finite_difference_hypergradient])
@pytest.mark.parametrize("hessian", [np.diag([1.0, 0.0]), np.ones((2, 2)), np.zeros((2, 2))])
def test_a_singular_hessian_is_an_error(reference, hessian):
    problem = bl.problems.quadratic(hessian, np.eye(2), np.ones(2))
    with pytest.raises(bl.SolverError, match="singular"):
        reference(problem, np.zeros(2), np.zeros(2))


def test_weights_in_different_units_do_not_pass_for_a_singular_hessian():
    problem = bl.problems.quadratic(np.diag([1e-20, 1e20]), np.eye(2), np.ones(2))
    params = np.array([2.0, 1.0])
    hg = exact_hypergradient(problem, params, np.zeros(2))
    np.testing.assert_allclose(hg.grad, [1e20, 0.0])


def test_an_hvp_that_is_not_symmetric_is_an_error():
    problem, params, lam = quadratic().at
    wrong = Broken(problem.inner, hvp=lambda p, h, v: np.triu(problem.inner.hessian) @ v)
    with pytest.raises(ValueError, match=r"inner hvp: expected a symmetric matrix, got .* at \(\d, \d\)"):
        exact_hypergradient(bl.Problem(wrong, problem.outer), params, lam)


@pytest.mark.parametrize("hessian", [np.diag([1.0, -1.0]), np.zeros((2, 2))])
def test_an_inner_problem_without_a_minimum_is_an_error(hessian):
    problem = bl.problems.quadratic(hessian, np.eye(2), np.ones(2), offset=1.0)
    with pytest.raises(bl.SolverError, match="inner problem could not be solved"):
        finite_difference_hypergradient(problem, np.ones(2), np.ones(2))


def test_references_refuse_what_is_too_large():
    large = bl.problems.quadratic(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="the exact reference would take 5,001 Hessian-vector products"):
        exact_hypergradient(large, np.zeros(5001), np.zeros(1))
    with pytest.raises(ValueError, match=r"hparams has 201 entries.*reference=\"finite-differences\", which tests"):
        finite_difference_hypergradient(large, np.zeros(1), np.zeros(201))


def test_differences_need_single_precision():
    with pytest.raises(bl.SolverError, match="need float32 or float64"):
        slope(np.sin, 1.0, float(np.finfo(np.float16).eps))


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
def test_leaves_of_any_shape_and_mixed_precision(backend, reference):
    """Zero-size and zero-dimensional leaves, float32 next to float64, zero hyperparameters."""
    rng = np.random.default_rng(0)

    class Inner:
        """Σ (w − λ w₀)² / 2 over the leaves, w₀ being data."""

        def __call__(self, w, h, *w0):
            return sum((0.5 * (a - b * c) ** 2).sum() for a, b, c in zip(w, h, w0, strict=True))

        def grad(self, w, h, *w0):
            return [a - b * c for a, b, c in zip(w, h, w0, strict=True)]

        def hvp(self, w, h, v, *w0):
            return v

        def cross_vjp(self, w, h, v, *w0):
            return [-a * c for a, c in zip(v, w0, strict=True)]

    class Outer:
        def __call__(self, w, h):
            return sum((a**3).sum() for a in w)

        def grad(self, w, h):
            return [3 * a**2 for a in w], None

    shapes, dtypes = ((2, 0), (), (3, 2)), (np.float64, np.float32, np.float64)
    arrays = [
        [rng.standard_normal(shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)] for _ in "ab"
    ]
    w0, h = ([backend.from_numpy(np.asarray(a)) for a in group] for group in arrays)
    w = [a * b for a, b in zip(w0, h, strict=True)]
    check_hypergradient(bl.Problem(Inner(), Outer()), w, h, inner_args=tuple(w0), reference=reference)


def test_differences_follow_losses_that_differentiate_by_themselves():
    torch = pytest.importorskip("torch")

    def inner(params, hparams):  # fit the slope of a polynomial
        x = torch.linspace(0, 1, 5, dtype=params.dtype, requires_grad=True)
        (slopes,) = torch.autograd.grad((params[0] * x + params[1] * x**2).sum(), x, create_graph=True)
        return ((slopes - hparams[0]) ** 2).mean() + hparams[1].exp() * (params**2).sum()

    problem = bl.Problem(inner, lambda params, hparams: (params**2).sum())
    params, hparams = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    solved = finite_difference_hypergradient(problem, params, hparams).params
    check_hypergradient(problem, solved, hparams, reference=DIFFERENCES)


def test_objectives_that_ignore_their_arguments_are_an_error():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 1).double()
    x, h = torch.ones(3, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    params = dict(module.named_parameters())

    def inner(params, hparams):
        return (module(x * hparams.exp()) ** 2).mean() + (module.weight**2).sum()

    def outer(params, hparams):
        return ((module(x) - 1) ** 2).mean()

    problem = bl.Problem(inner, outer)
    check_hypergradient(problem, params, h)  # the torch backend follows the module's own parameters
    with pytest.raises(ValueError, match="functional_call"):
        check_hypergradient(problem, params, h, reference=DIFFERENCES)


def test_a_random_objective_is_an_error():
    torch = pytest.importorskip("torch")
    w, h = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def inner(params, hparams):
        kept = torch.nn.functional.dropout(params, 0.5)
        return ((kept - 1) ** 2 * hparams.exp()).sum() + (params**2).sum()

    problem = bl.Problem(inner, lambda params, hparams: (params**2).sum())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="dropout"):
            finite_difference_hypergradient(problem, w, h)


@pytest.mark.parametrize("reference", ["exact", "finite-differences"])
@pytest.mark.parametrize("solver", ["cg", "identity"])
def test_the_callers_tensors_are_left_alone(reference, solver):
    torch = pytest.importorskip("torch")
    problem, params, hparams, data = tanh_net(framework("torch"))
    leaves = [leaf.requires_grad_() for _, leaf in leaves_with_paths((params, hparams))]
    before = [leaf.detach().clone() for leaf in leaves]
    with pytest.raises(AssertionError):  # params solve nothing yet, or the solver is no solver
        check_hypergradient(problem, params, hparams, solver=solver, reference=reference, rtol=1e-12, **data)
    for leaf, old in zip(leaves, before, strict=True):
        assert leaf.grad is None
        assert leaf.requires_grad
        assert torch.equal(leaf, old)


# The strategies


@given(st.data(), st.integers(1, 8), st.booleans())
def test_spectra_are_what_they_promise(data, n, indefinite):
    eigenvalues = data.draw(strategies.spectra(n, max_condition=1e3, indefinite=indefinite))
    assert eigenvalues.shape == (n,)
    assert (eigenvalues < 0).any() == indefinite
    assert np.abs(eigenvalues).max() <= 1.001e3 * np.abs(eigenvalues).min()
    matrix = data.draw(strategies.symmetric_matrices(n, dtype=np.float32))
    assert matrix.dtype == np.float32
    assert (matrix == matrix.T).all()


@given(strategies.trees(dtype=np.float32))
def test_trees_have_entries_of_their_dtype(tree):
    leaves = [leaf for _, leaf in leaves_with_paths(tree)]
    assert sum(leaf.size for leaf in leaves) >= 1
    assert all(leaf.dtype == np.float32 for leaf in leaves)


@given(strategies.quadratic_problems() | strategies.ridge_problems())
def test_params_of_a_case_are_stationary(case):
    grad = case.problem.inner.grad(case.params, case.hparams, *case.inner_args)
    size = np.linalg.norm(case.hessian) * (np.linalg.norm(case.params) + 1) + 10
    assert np.linalg.norm(grad) <= tolerance(case.params.dtype) * size


@pytest.mark.parametrize(
    ("hidden", "code", "output"),
    [
        (None, "import bilevel.testing; print('hypothesis' in sys.modules)", "False"),
        (
            "hypothesis",
            "try: from bilevel.testing import strategies\nexcept ImportError as error: print(error)",
            'bilevel.testing.strategies needs hypothesis, which is not installed: pip install "bilevel[testing]".',
        ),
    ],
)
def test_only_the_strategies_need_hypothesis(hidden, code, output):
    hide = f"sys.modules[{hidden!r}] = None\n" if hidden else ""
    done = subprocess.run([sys.executable, "-c", f"import sys\n{hide}{code}"], capture_output=True, text=True)
    assert done.stdout.strip() == output, done.stderr


def test_a_difference_as_large_as_the_noise_is_not_explained_by_a_zero_term():
    # The figures are from a network with kinks in float32. F does not depend on λ.
    tested = np.array([-0.0192679, 0.0520671, -0.0262308, 0.00233168, 0.0443491, -0.0431121, 0.0364698])
    differences = np.array([-0.0191596, 0.0517028, -0.0260553, 0.00206258, 0.0440991, -0.0431185, 0.0362973])
    noise = np.array([9e-5, 6e-5, 2e-4, 1e-4, 8e-5, 3e-4, 3e-5])
    assert relation(tested, differences, np.zeros(7), noise) is None
    assert "∂F/∂λ is missing" in relation(differences, differences + tested, tested, noise)
