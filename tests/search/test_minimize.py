"""The search for hyperparameters, against closed forms and SciPy's own minimum of them."""

import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from frameworks import framework, relative_error
from scipy import optimize

import bilevel as bl
from bilevel import Status, scipy_fit

RIDGE = bl.problems.ridge()
FEATURES = 5
BOUNDS = (-6.0, 3.0)


class PerFeature:
    """Ridge regression where only two of the features matter, moved to a framework."""

    def __init__(self, backend=None, n=20):
        rng = np.random.default_rng(0)
        weights = np.array([2.0, -1.0, 0.0, 0.0, 0.0])
        self.train_, self.val_ = (
            (X, X @ weights + rng.standard_normal(n)) for X in rng.standard_normal((2, n, FEATURES))
        )
        self.backend = backend or bl.get_backend("numpy")
        self.train, self.val = (tuple(map(self.backend.from_numpy, part)) for part in (self.train_, self.val_))
        self.hparams0 = self.backend.from_numpy(np.zeros(FEATURES))
        self.params0 = self.backend.from_numpy(np.zeros(FEATURES))
        self.fit = scipy_fit(RIDGE, inner_args=self.train)

    def minimize(self, **options):
        options = {
            "fit": self.fit,
            "params0": self.params0,
            "inner_args": self.train,
            "outer_args": self.val,
            "solver": bl.CG(rtol=1e-10),
            "bounds": BOUNDS,
            "maxiter": 200,
            **options,
        }
        return bl.minimize(RIDGE, options.pop("hparams0", self.hparams0), **options)

    def params(self, hparams):
        """w*(λ) in closed form."""
        X, y = self.train_
        return np.linalg.solve(X.T @ X / len(y) + np.diag(np.exp(hparams)), X.T @ y / len(y))

    def value(self, hparams):
        """F(w*(λ)) in closed form."""
        X, y = self.val_
        return 0.5 * np.mean((X @ self.params(hparams) - y) ** 2)


@cache
def searched(backend):
    return PerFeature(backend).minimize()


class TestRidgeWithAPenaltyPerFeature:
    @pytest.fixture
    def found(self, backend):
        return searched(backend)

    def test_agrees_with_scipy_on_the_closed_form(self, found, backend):
        case = PerFeature()
        expected = optimize.minimize(
            case.value, np.zeros(FEATURES), bounds=[BOUNDS] * FEATURES, options={"ftol": 1e-15, "gtol": 1e-10}
        )
        assert found.success
        assert found.fun == pytest.approx(expected.fun, rel=1e-6)
        assert relative_error(backend.to_numpy(found.params), case.params(expected.x)) <= 1e-2
        assert found.fun == pytest.approx(case.value(backend.to_numpy(found.x)), rel=1e-8)

    def test_beats_a_grid_over_one_shared_penalty(self, found):
        case = PerFeature()
        assert found.fun < 0.99 * min(case.value(np.full(FEATURES, s)) for s in np.linspace(*BOUNDS, 200))

    def test_stays_within_bounds_and_uses_them(self, found, backend):
        x = backend.to_numpy(found.x)
        assert (x >= BOUNDS[0]).all()
        assert (x <= BOUNDS[1]).all()
        assert (x == BOUNDS[1]).any()  # features that do not matter are penalized as much as allowed
        assert np.linalg.norm(backend.to_numpy(found.jac)) > 1e-3  # it pushes against the bounds ...
        assert found.history[-1].grad_norm < 1e-4  # ... which is not counted

    def test_the_linear_solves_tighten_with_progress(self, found):
        rtols = [evaluation.rtol for evaluation in found.history]
        assert rtols == sorted(rtols, reverse=True)
        assert rtols[0] == 1e-2
        norms = [evaluation.grad_norm for evaluation in found.history]
        for rtol, norm in zip(rtols[1:], norms, strict=False):
            assert rtol <= 1.001e-2 * norm / norms[0]
        assert rtols[-1] >= 1e-10

    def test_the_result_has_the_framework_and_the_shape_of_the_start(self, found, backend):
        for tree in (found.x, found.jac, found.params):
            assert backend.owns(tree)
            assert tuple(tree.shape) == (FEATURES,)
        assert isinstance(found.fun, float)
        assert found.nfev == len(found.history) >= found.nit
        assert all(evaluation.status == Status.CONVERGED for evaluation in found.history)


def test_the_text_of_a_result_is_short(backend):
    found = searched(backend)
    assert isinstance(found, optimize.OptimizeResult)
    assert f" history: {found.nfev} evaluations\n" in f"{found}\n"
    assert "Evaluation(" not in str(found)
    assert "points" not in str(found)
    assert len(found.state["points"]) == found.nfev


def test_backends_agree(backend):
    found, reference = searched(backend), searched(framework("numpy"))
    assert found.fun == pytest.approx(reference.fun, rel=1e-6)
    assert relative_error(backend.to_numpy(found.x), reference.x) <= 1e-3


@pytest.mark.parametrize("method", ["L-BFGS-B", "l-bfgs-b", "BFGS", "CG"])
def test_every_method_finds_the_minimum(method):
    target = np.array([0.5, -1.5])
    problem = bl.problems.quadratic(hessian=np.diag([1.0, 3.0]), coupling=np.eye(2), target=target)
    found = bl.minimize(problem, np.zeros(2), fit=lambda h, _: h / [1, 3], method=method, maxiter=200)
    assert relative_error(found.x, target * [1, 3]) <= 1e-3
    assert found.nit <= 200


@pytest.mark.parametrize(
    "bounds",
    [
        (-0.5, 1.0),
        optimize.Bounds(-0.5, 1.0),
        [(-0.5, 1.0), (-0.5, 1.0)],
        [[-0.5, 1.0], [-0.5, 1.0]],
        (-0.5, None),
        [(None, 1.0), (-0.5, None)],
    ],
    ids=["pair", "Bounds", "pairs", "lists", "None", "None in pairs"],
)
def test_bounds_in_every_form(bounds):
    problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.array([0.5, -1.5]))
    found = bl.minimize(problem, np.zeros(2), fit=lambda h, _: h, bounds=bounds)
    np.testing.assert_allclose(found.x, [0.5, -0.5], atol=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_the_outer_objective_does_not_matter(scale):
    def search(c):
        # F = ½‖w − t‖² in units of √c: w, t and the coupling are scaled alike.
        problem = bl.problems.quadratic(np.diag([1.0, 9.0]), c * np.eye(2), c * np.array([0.5, -1.5]))
        return bl.minimize(problem, np.zeros(2), fit=lambda h, _: c * h / [1, 9], bounds=(-20, 20))

    one, other = search(1.0), search(scale**0.5)
    np.testing.assert_allclose(other.x, one.x, rtol=1e-4)
    assert abs(other.nfev - one.nfev) <= 1  # rounding may decide whether the last step is taken


def test_the_callback_sees_each_iteration_at_its_minimum():
    case, seen = PerFeature(), []
    found = case.minimize(callback=seen.append)
    assert [result.nit for result in seen] == list(range(1, found.nit + 1))
    values = [result.fun for result in seen]
    assert values == sorted(values, reverse=True)
    for result in seen:  # later iterations do not write into earlier ones
        assert relative_error(result.params, case.params(result.x)) <= 1e-6
        assert result.fun == pytest.approx(case.value(result.x))


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS"])
def test_the_callback_can_stop_the_search(method):
    last = {}

    def stop_at_two(result):
        last.update(result)
        if result.nit == 2:
            raise StopIteration

    found = PerFeature().minimize(callback=stop_at_two, method=method, bounds=None)
    assert not found.success
    assert found.nit == 2
    np.testing.assert_array_equal(found.x, last["x"])
    assert found.fun == last["fun"]


def test_fits_start_from_the_last_accepted_solution():
    case, starts, solutions = PerFeature(), [], [None]

    def fit(hparams, params0):
        starts.append(params0)
        return case.fit(hparams, params0)

    case.minimize(fit=fit, callback=lambda result: solutions.append(result.params))
    assert starts[0] is case.params0
    known = [solution.tobytes() for solution in solutions[1:]]
    assert all(start.tobytes() in known for start in starts[3:])
    assert known[-2] in [start.tobytes() for start in starts]


class TestFitsThatTrainInPlace:
    """At every iteration, and at the end, params are those that hparams give."""

    def search(self, fit, backend, **options):
        case, seen = PerFeature(backend), []
        found = case.minimize(fit=fit, callback=seen.append, **options)
        assert len(seen) > 3
        for result in [*seen, found]:
            params, hparams = map(backend.to_numpy, (result.params, result.x))
            assert relative_error(params, case.params(hparams)) <= 1e-6
        return found

    @pytest.mark.parametrize("name", ["numpy", "torch"])  # JAX's arrays do not change
    def test_params0_itself(self, name):
        backend = framework(name)
        fit = PerFeature(backend).fit

        def in_place(hparams, params0):
            params0[:] = fit(hparams, params0)
            return params0

        self.search(in_place, backend)

    def test_a_module_that_pytorch_trains(self):
        torch = pytest.importorskip("torch")
        backend = framework("torch")
        weight, fit = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True), PerFeature(backend).fit

        def train(hparams, params0):
            with torch.no_grad():
                weight.copy_(fit(hparams, weight.detach()))
            return weight

        found = self.search(train, backend, params0=None)
        assert not found.params.requires_grad
        assert found.params is not weight


def test_a_float32_fit_of_float64_data():
    case = PerFeature()
    found = case.minimize(fit=lambda h, _: case.params(h).astype(np.float32))
    assert found.params.dtype == np.float32
    assert found.fun == pytest.approx(searched(case.backend).fun, rel=1e-4)


@pytest.mark.parametrize("bounds", [(0.0, 0.0), [(0.0, 0.0)] * FEATURES], ids=["pair", "pairs"])
def test_bounds_that_leave_nothing_to_search(bounds):
    found = PerFeature().minimize(bounds=bounds)
    assert (found.nit, found.success, len(found.history)) == (0, True, 1)
    np.testing.assert_array_equal(found.x, np.zeros(FEATURES))
    assert found.fun == pytest.approx(PerFeature().value(np.zeros(FEATURES)))


def test_the_linear_solves_tighten_even_without_progress():
    problem = bl.problems.quadratic(hessian=np.eye(1), coupling=np.eye(1), target=np.ones(1))
    steep = bl.Problem(problem.inner, Growing())
    found = bl.minimize(steep, np.zeros(1), fit=lambda h, _: h, maxiter=2, solver=bl.CG(rtol=1e-12))
    norms, rtols = ([evaluation[i] for evaluation in found.history] for i in (1, 2))
    assert min(norms) == norms[0]  # it never gets flatter than at the start
    assert len(rtols) > 3
    assert all(after < before for before, after in pairwise(rtols))


class Growing:
    """F = −w² − w, which falls ever more steeply from zero on."""

    def __call__(self, w, h):
        return -(w**2 + w).sum()

    def grad(self, w, h):
        return -2 * w - 1, None


def test_warm_starts_save_steps():
    case = PerFeature()
    cold = bl.hypergradient(
        RIDGE,
        case.params(np.zeros(5)),
        np.zeros(5),
        inner_args=case.train,
        outer_args=case.val,
        solver=bl.CG(rtol=1e-2),
    )
    found = case.minimize(solver=bl.CG(rtol=1e-2))
    assert found.history[0].steps == cold.info.steps
    assert np.mean([evaluation.steps for evaluation in found.history[1:]]) < cold.info.steps


@pytest.mark.parametrize("solver", ["exact", "neumann", bl.Unrolled(steps=100)], ids=["exact", "neumann", "unrolled"])
def test_a_solver_without_tolerance_is_left_as_it_is(solver):
    found = PerFeature().minimize(solver=solver)
    assert {evaluation.rtol for evaluation in found.history} == {None}
    assert found.fun < PerFeature().value(np.zeros(FEATURES))


def test_trees_of_hyperparameters(backend):
    def tree(a, b):
        return {"a": backend.from_numpy(np.asarray(a)), "b": (backend.from_numpy(np.asarray(b)),)}

    found = bl.minimize(
        bl.Problem(TreeInner(), TreeOuter()),
        tree([[0.0, 0.0]], 0.0),
        fit=lambda h, _: {"w": 1.0 * h["a"], "v": 1.0 * h["b"][0]},
    )
    np.testing.assert_allclose(backend.to_numpy(found.x["a"]), [[1.0, 1.0]], atol=1e-4)
    np.testing.assert_allclose(backend.to_numpy(found.x["b"][0]), -2.0, atol=1e-4)


class TreeInner:
    """L = ½ ‖w − a‖² + ½ (v − b)²."""

    def __call__(self, w, h):
        return 0.5 * ((w["w"] - h["a"]) ** 2).sum() + 0.5 * (w["v"] - h["b"][0]) ** 2

    def grad(self, w, h):
        return {"w": w["w"] - h["a"], "v": w["v"] - h["b"][0]}

    def hvp(self, w, h, v):
        return v

    def cross_vjp(self, w, h, v):
        return {"a": -v["w"], "b": (-v["v"],)}


class TreeOuter:
    """F = ½ ‖w − 1‖² + ½ (v + 2)²."""

    def __call__(self, w, h):
        return 0.5 * ((w["w"] - 1) ** 2).sum() + 0.5 * (w["v"] + 2) ** 2

    def grad(self, w, h):
        return {"w": w["w"] - 1, "v": w["v"] + 2}, None


def test_jax_does_not_trace_again_when_the_tolerance_changes():
    jax = pytest.importorskip("jax")
    problem, traces = RIDGE, []

    def inner(w, h, X, y):
        traces.append(1)
        return problem.inner(w, h, X, y)

    case, counts, counted = PerFeature(framework("jax")), [], bl.Problem(inner, problem.outer)
    found = bl.minimize(
        counted,
        case.hparams0,
        fit=scipy_fit(counted, inner_args=case.train),
        params0=case.params0,
        inner_args=case.train,
        outer_args=case.val,
        solver=bl.CG(rtol=1e-10),
        bounds=BOUNDS,
        callback=lambda result: counts.append(len(traces)),
    )
    assert len({evaluation.rtol for evaluation in found.history}) > 5
    assert len(counts) > 5
    assert counts[-1] == counts[0]
    assert isinstance(found.x, jax.Array)


class TestMistakes:
    def test_an_unknown_method_gets_the_nearest_name(self):
        with pytest.raises(ValueError, match=r"does not support 'L-BFGS'\. Did you mean 'L-BFGS-B'"):
            PerFeature().minimize(method="L-BFGS")

    def test_a_method_without_gradients_is_refused(self):
        with pytest.raises(ValueError, match="does not support 'Nelder-Mead'"):
            PerFeature().minimize(method="Nelder-Mead")

    def test_bounds_with_a_method_that_takes_none(self):
        with pytest.raises(ValueError, match='bounds: BFGS does not accept bounds; use method="L-BFGS-B" or "SLSQP"'):
            PerFeature().minimize(method="bfgs")

    @pytest.mark.parametrize(
        "bounds", [3.0, [], [(0, 1)] * 3, [0, 1, 2], {"low": 0, "high": 1}, (np.zeros(5), np.ones(5))], ids=str
    )
    def test_bounds_of_another_form(self, bounds):
        with pytest.raises(ValueError, match=r"bounds: expected \(low, high\), .* each of 5 entries, got"):
            PerFeature().minimize(bounds=bounds)

    @pytest.mark.parametrize("bounds", [(np.nan, 1.0), [(0.0, 1.0)] * 4 + [(0.0, np.nan)]], ids=str)
    def test_bounds_that_are_nan(self, bounds):
        with pytest.raises(ValueError, match=r"bounds: nan is no bound, .* write None"):
            PerFeature().minimize(bounds=bounds)

    def test_a_fit_that_changes_its_hyperparameters(self):
        def fit(hparams, params0):
            params = hparams.copy()
            hparams += 1.0
            return params

        problem = bl.problems.quadratic(np.eye(2), np.eye(2), np.array([0.5, -1.5]))
        found = bl.minimize(problem, np.zeros(2), fit=fit)
        np.testing.assert_allclose(found.x, [0.5, -1.5], atol=1e-4)  # its params belong to the values before
        assert found.success

    @pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "SLSQP"])
    def test_a_fit_that_ignores_its_hyperparameters(self, method):
        problem = bl.problems.quadratic(np.eye(2), np.eye(2), np.array([0.5, -1.5]))
        found = bl.minimize(problem, np.zeros(2), fit=lambda h, _: np.zeros(2), method=method)
        assert not found.success
        assert re.search("check that (fit|it) uses its hyperparameters", found.message)

    @pytest.mark.parametrize("maxiter", [0, -1, 2.5, True, None, "5"])  # SciPy's L-BFGS-B takes 0 for 1
    def test_maxiter_that_is_no_number_of_iterations(self, maxiter):
        with pytest.raises(ValueError, match=r"maxiter: expected an integer >= 1, got"):
            PerFeature().minimize(maxiter=maxiter)

    def test_a_fit_that_returns_nothing(self):
        with pytest.raises(TypeError, match=r"fit returned None\. Return the params\."):
            PerFeature().minimize(fit=lambda hparams, params0: None)

    def test_an_unknown_solver(self):
        with pytest.raises(ValueError, match="Did you mean 'cg'"):
            PerFeature().minimize(solver="cgg")

    def test_integer_hyperparameters(self):
        with pytest.raises(TypeError, match="hparams: expected a floating-point leaf"):
            PerFeature().minimize(hparams0=np.zeros(FEATURES, int))

    def test_hyperparameters_of_no_framework(self):
        with pytest.raises(TypeError, match=r"^hparams0: expected a tree of NumPy, torch or JAX arrays, got list"):
            PerFeature().minimize(hparams0=[0.0, 0.0])


class TestFailures:
    def search(self, bounds=None, **options):
        """F falls towards λ = 10, but for λ > 2 the inner problem overflows."""
        problem = bl.problems.quadratic(np.eye(1), np.eye(1), np.full(1, 10.0))
        return bl.minimize(problem, np.zeros(1), fit=lambda h, _: np.where(h > 2, np.nan, h), bounds=bounds, **options)

    def test_a_trial_that_is_not_finite_names_the_way_out(self):
        with pytest.raises(bl.SolverError, match=r"infinity.* evaluation \d+ of minimize, .* bounds=\(low, high\)"):
            self.search()

    def test_bounds_are_the_way_out(self):
        assert self.search(bounds=(-1.0, 1.5)).x == pytest.approx([1.5])

    def test_failed_solves_warn_once_and_are_all_recorded(self):
        with pytest.warns(bl.SolverWarning, match="CG: stopped after 1 step") as caught:
            found = PerFeature().minimize(solver=bl.CG(maxiter=1), maxiter=2)
        assert len(caught) == 1
        assert all(evaluation.status == Status.MAXITER for evaluation in found.history)
        assert len(found.history) > 1

    def test_failed_solves_raise_on_request(self):
        with pytest.raises(bl.SolverError, match="CG: stopped after 1 step"):
            PerFeature().minimize(solver=bl.CG(maxiter=1), on_failure="raise")


class TestProgress:
    def test_a_bar_shows_iterations_and_value(self, capsys):
        pytest.importorskip("tqdm")
        found = PerFeature().minimize(progress=True, maxiter=3)
        err = capsys.readouterr().err
        assert "3/3" in err
        assert f"value={found.fun:.5g}" in err

    def test_no_terminal_no_bar(self, capsys):
        PerFeature().minimize(maxiter=3)
        assert capsys.readouterr().err == ""
