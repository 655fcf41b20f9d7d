"""Messages about arguments of `bl.hypergradient` and `bl.minimize` that do not fit the functions or each other."""

import numpy as np
import pytest
from frameworks import namespace

import bilevel as bl

RIDGE = bl.problems.ridge()
DATA = np.eye(3), np.ones(3)


def zeros(backend, shape=3):
    return backend.from_numpy(np.zeros(shape))


def inner(w, h, X, y):
    return ((X @ w - y) ** 2).mean() + (h**2 * w**2).sum()


def outer(w, h, X, y):
    return ((X @ w - y) ** 2).mean()


class TestFurtherArguments:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (
                ["inner_args"],
                r"^outer is called with \(params, hparams, \*outer_args\), and outer_args has 0 entries\.",
            ),
            (
                ["outer_args"],
                r"^inner is called with \(params, hparams, \*inner_args\), and inner_args has 0 entries\.",
            ),
        ],
    )
    def test_that_are_forgotten(self, backend, data, text):
        data = {name: tuple(backend.from_numpy(x) for x in DATA) for name in data}
        signature = (
            r" Its signature is \(\w+, \w+, X, y(, sample_weight)?\)\. Pass its further arguments by \w+=\(\.\.\.\)"
        )
        problem = RIDGE if backend.name == "numpy" else bl.Problem(inner, outer)
        with pytest.raises(TypeError, match=text + signature):
            bl.hypergradient(problem, zeros(backend), zeros(backend), **data)

    def test_that_are_forgotten_elsewhere(self):
        text = r"^inner is called with \(params, hparams, \*inner_args\), and inner_args has 0 entries\."
        w = np.zeros(3)
        for call in (
            lambda: bl.prepare("neumann", RIDGE, w, w),
            lambda: bl.diagnose(RIDGE, w, w, outer_args=DATA),
            lambda: bl.scipy_fit(RIDGE)(w, w),
        ):
            with pytest.raises(TypeError, match=text):
                call()

    def test_too_many(self):
        text = (
            r"inner is called with .* inner_args has 4 entries\..* Give it 6 parameters: params and hparams come first"
        )
        with pytest.raises(TypeError, match=text):
            bl.hypergradient(RIDGE, np.zeros(3), np.zeros(3), inner_args=(*DATA, 1, 1), outer_args=DATA)

    def test_an_objective_without_hparams(self):
        torch = pytest.importorskip("torch")
        data = {"inner_args": (torch.eye(3), torch.ones(3)), "outer_args": (torch.eye(3), torch.ones(3))}
        problem = bl.Problem(inner, lambda w, X, y: outer(w, None, X, y))
        with pytest.raises(TypeError, match=r"outer is called with .* Its signature is \(w, X, y\)\. Give it 4 param"):
            bl.hypergradient(problem, torch.zeros(3), torch.zeros(3), **data)

    def test_a_loader_or_a_dict(self):
        torch = pytest.importorskip("torch")
        w, loader = torch.zeros(3), torch.utils.data.DataLoader(torch.eye(3))
        for name, other in (("inner_args", "outer_args"), ("outer_args", "inner_args")):
            for args, text in ((loader, rf"write {name}=bl\.MicroBatches\(loader\)"), ({}, rf"write {name}=\(x,\)")):
                with pytest.raises(TypeError, match=f"^{name}: expected a tuple of arguments, .*{text}"):
                    bl.hypergradient(bl.Problem(inner, outer), w, w, **{name: args, other: ()})

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_of_a_model(self, name):
        pytest.importorskip(name)
        problem = bl.Problem.from_model(lambda w, h, x: x @ w, lambda z, y: (z - y).sum(), lambda w, h: w.sum())
        with pytest.raises(TypeError, match=r"inner_args has 0 entries\. Its signature is \(params, hparams, x, "):
            bl.hypergradient(problem, zeros(bl.get_backend(name)), zeros(bl.get_backend(name)))

    def test_of_a_step(self):
        jnp = pytest.importorskip("jax.numpy")
        problem = bl.FixedPoint(lambda w, h, x: w / 2 + h * x, lambda w, h: (w**2).sum())
        with pytest.raises(TypeError, match=r"step is called with \(params, hparams, \*inner_args\)"):
            bl.hypergradient(problem, jnp.zeros(2), jnp.zeros(2), solver="gmres")

    @pytest.mark.parametrize("function", [bl.hypergradient, bl.diagnose])
    def test_losses_in_place_of_a_problem(self, function):
        """The functions of bilevel_torch with the same names receive two losses."""
        name = function.__name__
        text = rf"^bl\.{name} expects .* pass bl\.Problem\(inner, outer\)\. .* bilevel_torch\.{name} "
        with pytest.raises(TypeError, match=text):
            function(inner, outer, np.zeros(3), np.zeros(3))

    def test_an_error_inside_of_a_loss_stays(self):
        torch = pytest.importorskip("torch")
        problem = bl.Problem(lambda w, h: (w @ None).sum(), lambda w, h: (w**2).sum())
        with pytest.raises(TypeError, match="NoneType"):
            bl.hypergradient(problem, torch.zeros(2), torch.zeros(2))

    def test_an_array_in_place_of_a_tuple(self, backend):
        with pytest.raises(TypeError, match=r"inner_args: .* got an array\. .*write inner_args=\(x,\)"):
            bl.hypergradient(RIDGE, zeros(backend), zeros(backend), inner_args=zeros(backend))


class TestTrees:
    def test_a_number_names_the_argument(self, backend):
        with pytest.raises(TypeError, match=r"^hparams0 is a number of Python\. Write np\.array\(-3\.0\),"):
            bl.minimize(RIDGE, -3.0, fit=lambda h, w: w)
        with pytest.raises(TypeError, match=r"^params is a number of Python"):
            bl.hypergradient(RIDGE, 1.0, 2.0)
        with pytest.raises(TypeError, match=r"^hparams is a number of Python"):
            bl.hypergradient(RIDGE, [], 2.0)

    @pytest.mark.parametrize(
        ("adjoint0", "text"),
        [
            (
                {"w": 3},
                r"^adjoint0: expected the structure of params\. params has shape \(3,\), but adjoint0 is no array\.",
            ),
            (4, r"^adjoint0: .*\. params has shape \(3,\), but adjoint0 has shape \(4,\)\."),
        ],
    )
    def test_an_adjoint_of_another_structure(self, backend, adjoint0, text):
        size = adjoint0 if isinstance(adjoint0, int) else adjoint0["w"]
        adjoint0 = zeros(backend, size) if isinstance(adjoint0, int) else {"w": zeros(backend, size)}
        with pytest.raises(ValueError, match=text):
            bl.hypergradient(RIDGE, zeros(backend), zeros(backend), adjoint0=adjoint0)


class Estimator:
    coef_ = np.zeros(3)


class TestFits:
    @pytest.mark.parametrize(
        ("result", "text"),
        [
            (None, r"^fit returned None\. Return the params\.$"),
            (Estimator(), r"^fit returned an Estimator\. Return the params, for example a copy of its coef_\."),
            ((np.zeros(3), 0.5), r"^fit returned a tuple of 2, where \[1\] is a float\. Return only the params\.$"),
            ({"w": np.zeros(3), "n": 3}, r"^fit returned a dict, where \['n'\] is an int\. Return only the params\.$"),
        ],
        ids=["nothing", "an estimator", "its loss too", "a number too"],
    )
    def test_that_return_something_else(self, result, text):
        with pytest.raises(TypeError, match=text):
            bl.minimize(RIDGE, np.zeros(3), fit=lambda h, w: result, inner_args=DATA, outer_args=DATA)

    def test_that_return_another_shape(self, backend):
        results = [zeros(backend) - 1, zeros(backend, 2)]
        data = tuple(map(backend.from_numpy, DATA))
        text = r"^the result of fit: .* its result before has shape \(3,\), but the result of fit has shape \(2,\)"
        with pytest.raises(ValueError, match=text):
            bl.minimize(
                RIDGE,
                zeros(backend),
                fit=lambda h, w: results.pop(0),
                inner_args=data,
                outer_args=data,
                on_failure="ignore",
            )

    @pytest.mark.parametrize(
        ("fit", "got"),
        [
            (lambda h: h, r"a lambda\(h\)"),
            (np.zeros(3), "a ndarray"),
            (lambda h, w, steps: w, r"a lambda\(h, w, steps\)"),
        ],
    )
    def test_that_cannot_be_called(self, fit, got):
        with pytest.raises(
            TypeError, match=rf"^fit: expected a function fit\(hparams, params0\) -> params, got {got}\.$"
        ):
            bl.minimize(RIDGE, np.zeros(3), fit=fit)


class TestUnsolved:
    """A search whose fit does not solve the inner problem does not end with success."""

    def search(self, backend, fit, **options):
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((60, 5)), rng.standard_normal(60)
        X, y = (backend.from_numpy(a) for a in (X, y + X.sum(1)))
        self.xp = namespace(backend)
        data = {"inner_args": (X, y), "outer_args": (X[:30], y[:30])}
        return bl.minimize(RIDGE, backend.from_numpy(np.full(5, -2.0)), fit=fit, bounds=(-6, 3), **data, **options)

    @pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning", "ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_constant(self, backend, value):
        found = self.search(backend, lambda h, w: backend.from_numpy(np.full(5, value)))
        assert (found.success, found.status) == (False, -1)
        assert found.message.startswith("fit does not solve the inner problem: to first order, the outer objective")
        assert found.history[0].inner_grad_norm > 0.1

    def test_noise(self):
        backend, rng = bl.get_backend("numpy"), np.random.default_rng(1)
        exact = []

        def fit(h, w):
            solve = bl.scipy_fit(RIDGE, inner_args=exact[0])
            return solve(h, np.zeros(5)) + 1e-2 * rng.standard_normal(5)

        rng_ = np.random.default_rng(0)
        X = rng_.standard_normal((60, 5))
        exact.append((X, rng_.standard_normal(60) + X.sum(1)))
        with pytest.warns(bl.InnerProblemWarning, match=r"^minimize: fit does not solve the inner problem"):
            found = self.search(backend, fit)
        assert not found.success

    @pytest.mark.parametrize("error", [1e-3, 1.0])
    def test_rounding_of_float32_is_no_failure(self, backend, error):
        """Params that differ from the solution by about √eps, as a fit in float32 leaves them, or by much more."""
        X, y = self.data(bl.get_backend("numpy"))
        solve = bl.scipy_fit(RIDGE, inner_args=(X, y))

        def fit(h, w):
            exact = solve(np.asarray(backend.to_numpy(h), np.float64), np.zeros(5))
            return backend.from_numpy((exact * (1 + error * np.array([1, -1, 1, -1, 1]))).astype(np.float32))

        at = np.full(5, -2.0, np.float32), (X.astype(np.float32), y.astype(np.float32))
        h, data = backend.from_numpy(at[0]), tuple(map(backend.from_numpy, at[1]))
        found = bl.minimize(RIDGE, h, fit=fit, maxiter=1, inner_args=data, outer_args=data, on_failure="ignore")
        assert ("fit does not solve" in found.message) == (error == 1.0)

    def test_ignored_warnings_still_give_no_success(self):
        found = self.search(bl.get_backend("numpy"), lambda h, w: np.zeros(5), on_failure="ignore")
        assert not found.success

    def test_an_exact_fit_has_success(self, backend):
        def fit(h, w):
            start = backend.from_numpy(np.zeros(5)) if w is None else w
            return bl.scipy_fit(RIDGE, inner_args=self.data(backend))(h, start)

        found = self.search(backend, fit)
        assert found.success
        assert abs(found.history[-1].value_error) <= 1e-6 * found.fun

    def test_a_start_at_a_minimum_ends_the_search(self):
        """The hypergradient is rounding, so a search along it would go anywhere."""
        rng = np.random.default_rng(0)
        data = rng.standard_normal((60, 5)), rng.standard_normal(60)
        w = np.linalg.lstsq(*data, rcond=None)[0]
        found = bl.minimize(RIDGE, np.full(5, -2.0), fit=lambda h, _: w, inner_args=data, outer_args=data)
        assert 0 < np.linalg.norm(found.jac) < 1e-15
        assert (found.nit, found.nfev) == (0, 1)
        assert np.array_equal(found.x, np.full(5, -2.0))

    def data(self, backend):
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((60, 5)), rng.standard_normal(60)
        return tuple(backend.from_numpy(a) for a in (X, y + X.sum(1)))


class TestFarFromTheSolution:
    def call(self, backend, w, **options):
        data = {"inner_args": tuple(map(backend.from_numpy, DATA)), "outer_args": tuple(map(backend.from_numpy, DATA))}
        h = backend.from_numpy(np.full(3, -3.0))
        return bl.hypergradient(RIDGE, backend.from_numpy(np.asarray(w)), h, **data, **options)

    def test_it_warns_once_with_the_way_out(self, backend):
        with pytest.warns(
            bl.InnerProblemWarning, match=r"^params do not solve.*bl\.Projected or bl\.Proximal.*unrolled.*simplefilter"
        ):
            hg = self.call(backend, [0.0, 0.0, 5.0])
        assert abs(hg.info.value_error) > 0.2 * float(backend.to_host(hg.value))

    def test_untrained_params_of_zero_warn_earlier(self, backend):
        rng = np.random.default_rng(0)
        X, y, X_val = rng.standard_normal((60, 5)), rng.standard_normal(60), rng.standard_normal((60, 5))
        X, y, X_val, y_val = map(backend.from_numpy, (X, y, X_val, np.ones(60)))
        h, data = backend.from_numpy(np.full(5, -2.0)), {"inner_args": (X, y), "outer_args": (X_val, y_val)}
        zero = backend.from_numpy(np.zeros(5))
        with pytest.warns(bl.InnerProblemWarning, match=r"\(1% for params of zero; see info\.value_error\)"):
            hg = bl.hypergradient(RIDGE, zero, h, **data)
        assert 0.01 < abs(hg.info.value_error) / float(backend.to_host(hg.value)) < 0.2

    def test_the_estimate_is_first_order(self, backend):
        solution = 1 / (1 + 3 * np.exp(-3.0)) * np.ones(3)
        errors = []
        for step in (1e-3, 1e-4):
            at, there = self.call(backend, solution + step), self.call(backend, solution)
            actual = float(backend.to_host(at.value)) - float(backend.to_host(there.value))
            errors.append(abs(at.info.value_error - actual))
            assert at.info.value_error == pytest.approx(actual, rel=2e-2)
        assert errors[1] <= 0.02 * errors[0]  # of second order

    @pytest.mark.filterwarnings("error::bilevel.InnerProblemWarning")
    def test_it_stays_quiet_if_v_is_no_solution(self, backend):
        self.call(backend, [0.0, 0.0, 5.0], solver="identity")

    @pytest.mark.filterwarnings("error::bilevel.InnerProblemWarning")
    def test_it_stays_quiet_if_the_outer_objective_is_close_to_zero(self, backend):
        target = backend.from_numpy(np.ones(2))
        quadratic = bl.problems.quadratic(*(backend.from_numpy(x) for x in (np.eye(2), np.eye(2), np.ones(2))))

        class Shifted:  # like a reward, or a difference to a baseline
            def __call__(self, w, h):
                return 0.5 * ((w - target) ** 2).sum() - 0.25

            def grad(self, w, h):
                return w - target, None

        h = np.array([0.5, 0.5])
        problem = bl.Problem(quadratic.inner, Shifted())
        hg = bl.hypergradient(problem, backend.from_numpy(h + 1e-5), backend.from_numpy(h))
        assert abs(hg.info.value_error) > 0.2 * abs(float(backend.to_host(hg.value)))

    @pytest.mark.filterwarnings("error::bilevel.InnerProblemWarning")
    def test_it_stays_quiet_with_a_list_of_batches(self, backend):
        rng = np.random.default_rng(0)
        X = rng.standard_normal((40, 3))
        y = X.sum(1) + rng.standard_normal(40)
        h = np.full(3, -2.0)
        w = np.linalg.solve(X.T @ X / 40 + np.diag(np.exp(h)), X.T @ y / 40)
        batches = [tuple(map(backend.from_numpy, (X[i::4], y[i::4]))) for i in range(4)]
        val = backend.from_numpy(X), backend.from_numpy(X @ w + 1e-2)
        start, data = backend.from_numpy(h), {"inner_args": batches, "outer_args": val}
        solver = bl.Neumann(terms=30, step_size=0.2)
        hg = bl.hypergradient(RIDGE, backend.from_numpy(w), start, solver=solver, **data)
        assert np.isnan(hg.info.value_error)
        assert hg.info.inner_grad_norm > 0.1  # of the first batch
        found = bl.minimize(RIDGE, start, fit=lambda h, _: backend.from_numpy(w), solver=solver, maxiter=1, **data)
        assert found.status != -1

    @pytest.mark.filterwarnings("error::bilevel.InnerProblemWarning")
    def test_it_stays_quiet_if_failures_are_ignored(self, backend):
        self.call(backend, [0.0, 0.0, 5.0], on_failure="ignore")


class TestSolversOfUsers:
    @pytest.mark.parametrize("result", [None, np.zeros(3), (np.zeros(3), "converged")], ids=["None", "v", "text"])
    def test_that_return_no_info(self, backend, result):
        class Short(bl.LinearSolver):
            def solve(self, state, A, b, x0):
                return result

        with pytest.raises(
            TypeError, match=r"^Short\.solve\(state, A, b, x0\) must return \(v, info\), where info is a bl"
        ):
            self.call(backend, Short())

    def test_without_a_method_solve(self, backend):
        class Empty(bl.LinearSolver):
            pass

        with pytest.raises(NotImplementedError, match=r"Empty has no method solve\(state, A, b, x0\)"):
            self.call(backend, Empty())

    def call(self, backend, solver):
        data = tuple(backend.from_numpy(x) for x in DATA)
        problem = RIDGE if backend.name == "numpy" else bl.Problem(inner, outer)
        return bl.hypergradient(
            problem, zeros(backend), zeros(backend), inner_args=data, outer_args=data, solver=solver
        )


class TestWarmStarts:
    def call(self, backend, adjoint0):
        data = tuple(backend.from_numpy(x) for x in DATA)
        problem = RIDGE if backend.name == "numpy" else bl.Problem(inner, outer)
        w, h = (backend.from_numpy(np.full(3, x)) for x in (0.9, 0.2))
        return bl.hypergradient(problem, w, h, inner_args=data, outer_args=data, adjoint0=adjoint0)

    def test_that_are_a_hypergradient(self, backend):
        with pytest.raises(
            TypeError, match=r"^adjoint0 is a Hypergradient\. Pass one of its trees, such as hg\.adjoint"
        ):
            self.call(backend, self.call(backend, None))

    def test_that_are_not_finite(self, backend):
        with pytest.raises(bl.SolverError, match=r"infinity in 1 of the 3 entries of adjoint0\. Leave adjoint0 out"):
            self.call(backend, backend.from_numpy(np.array([1.0, np.nan, 1.0])))


class TestLinearizations:
    @pytest.mark.parametrize(
        ("wrong", "error", "text"),
        [
            ({"value": [0.5]}, ValueError, r"value: expected the number F\(w, λ\), got .* of shape \(1,\)"),
            (
                {"cross_vjp": lambda v: None},
                ValueError,
                r"depends on hparams: grad_hparams is None, and cross_vjp\(v\) has returned None",
            ),
        ],
        ids=["value", "cross_vjp"],
    )
    def test_with_a_wrong_field(self, wrong, error, text):
        right = bl.Linearization(
            value=0.5, grad_params=np.ones(2), grad_hparams=None, hvp=lambda v: v, cross_vjp=lambda v: v
        )
        assert bl.hypergradient_from(right).grad.tolist() == [-1.0, -1.0]
        with pytest.raises(error, match=text):
            bl.hypergradient_from(right._replace(**wrong))

    def test_with_an_adjoint_that_is_not_finite(self):
        right = bl.Linearization(0.5, np.ones(2), None, lambda v: v, lambda v: v)
        with pytest.raises(bl.SolverError, match=r"in adjoint0 \(all 2 entries\)\. Leave adjoint0 out"):
            bl.hypergradient_from(right, adjoint0=np.full(2, np.nan))


class TestLinearModels:
    def test_params_that_are_a_list(self):
        with pytest.raises(TypeError, match=r"^params: expected one array of weights, got list"):
            bl.minimize(RIDGE, np.zeros(3), fit=lambda h, _: [*np.ones(3)], inner_args=DATA, outer_args=DATA, maxiter=1)

    @pytest.mark.parametrize("problem", [RIDGE, bl.problems.logistic_regression()], ids=["ridge", "logistic"])
    def test_targets_that_are_names(self, problem):
        data = DATA[0], np.array(["cat", "dog", "cat"])
        with pytest.raises(TypeError, match=r"^y: expected numbers, got <U3\. Encode names of classes"):
            bl.hypergradient(problem, np.zeros(3), np.zeros(3), inner_args=data, outer_args=data)
