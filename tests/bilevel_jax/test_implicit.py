"""`implicit_minimizer`: against closed forms that JAX differentiates by itself, in all modes and orders."""

import warnings

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

TIGHT = bl.CG(rtol=1e-12)
ROWS = 12


def inner(w, h, X, y, *ignored):
    return jnp.mean((X @ w["w"] - y) ** 2) + jnp.sum(jnp.exp(h["decay"]) * w["w"] ** 2)


def ridge(h, X, y, *ignored):
    """The minimizer in closed form, which JAX can differentiate in any way."""
    return {"w": jnp.linalg.solve(X.T @ X / ROWS + jnp.diag(jnp.exp(h["decay"])), X.T @ y / ROWS)}


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 6)
    X, X_val = (jax.random.normal(k, (ROWS, 3)) for k in keys[:2])
    y, y_val = (jax.random.normal(k, (ROWS,)) for k in keys[2:4])
    return {"decay": jax.random.normal(keys[4], (3,))}, X, y, lambda w: jnp.mean((X_val @ w["w"] - y_val) ** 2)


def objectives(outer, solver=TIGHT, train=ridge):
    """F(w*(λ)) by the implicit minimizer, and by the closed form."""
    solve = bilevel_jax.implicit_minimizer(inner, solver=solver)(train)
    return lambda *args: outer(solve(*args)), lambda *args: outer(ridge(*args))


SCALES = np.array([0.5, 1.0])


def scaled(tree, factor):
    return jax.tree.map(lambda a: factor * a, tree)


def agree(x, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= tolerance


class TestDerivatives:
    @pytest.mark.parametrize(
        "transform",
        [
            pytest.param(lambda f: jax.grad(f, (0, 1, 2)), id="reverse"),
            pytest.param(lambda f: jax.jacfwd(f, (0, 1, 2)), id="forward"),
            pytest.param(lambda f: jax.jit(jax.grad(f)), id="jit of grad"),
            pytest.param(lambda f: jax.grad(jax.jit(f)), id="grad of jit"),
            pytest.param(lambda f: jax.grad(jax.checkpoint(f)), id="checkpoint"),
            pytest.param(lambda f: jax.jit(jax.jacfwd(jax.grad(f))), id="forward over reverse"),
            pytest.param(lambda f: jax.jit(jax.jacrev(jax.grad(f))), id="reverse over reverse"),
        ],
    )
    def test_all_modes_and_orders_match_the_closed_form(self, case, transform):
        """By hparams and, where asked, by the data."""
        *args, outer = case
        ours, exact = objectives(outer)
        agree(transform(ours)(*args), transform(exact)(*args))

    def test_vmap_matches_a_loop(self, case):
        h, X, y, outer = case
        ours, exact = objectives(outer)
        hs = jax.tree.map(lambda a: jnp.stack([a, a + 1]), h)
        mapped = jax.vmap(jax.grad(ours), (0, None, None))(hs, X, y)
        for i in range(2):
            agree(
                jax.tree.map(lambda a, i=i: a[i], mapped),
                jax.grad(exact)(jax.tree.map(lambda a, i=i: a[i], hs), X, y),
            )

    @pytest.mark.parametrize(
        "transform",
        [
            pytest.param(lambda f: jax.grad(f, (0, 1)), id="eager"),
            pytest.param(lambda f: jax.jit(jax.grad(f, (0, 1))), id="jit of grad"),
            pytest.param(lambda f: jax.grad(jax.jit(f), (0, 1)), id="grad of jit"),
            pytest.param(lambda f: lambda h, X: jax.vmap(lambda c: jax.grad(f)(scaled(h, c), X))(SCALES), id="vmap"),
        ],
    )
    def test_what_is_closed_over_is_differentiated_too(self, case, transform):
        h, X, y, outer = case

        def closed(h, X):
            solve = bilevel_jax.implicit_minimizer(lambda w, shift: inner(w, h, X, y + shift), solver=TIGHT)(
                lambda shift: ridge(h, X, y + shift)
            )
            return outer(solve(jnp.zeros(ROWS)))

        def exact(h, X):
            return outer(ridge(h, X, y))

        agree(transform(closed)(h, X), transform(exact)(h, X))

    def test_some_params_may_follow_hparams_through_others_only(self):
        def coupled(params, h):
            w, b = params
            return jnp.sum((w - 1) ** 2 + jnp.exp(h) * w**2) + jnp.sum((b - 3 * w) ** 2)

        def minimum(h):
            w = 1 / (1 + jnp.exp(h))
            return w, 3 * w

        h = jnp.array([0.5, -1.0])
        solve = bilevel_jax.implicit_minimizer(coupled, solver=TIGHT)(minimum)
        ours, exact = (jax.grad(lambda h, f=f: jnp.sum(f(h)[0] * f(h)[1])) for f in (solve, minimum))
        agree(ours(h), exact(h))
        agree(jax.jit(jax.jacrev(ours))(h), jax.jacrev(exact)(h))

    def test_it_is_the_hypergradient(self, case):
        h, X, y, outer = case
        solver = {"name": "neumann", "terms": 3}
        grad = jax.grad(objectives(outer, solver)[0])(h, X, y)
        problem = bl.Problem(inner, lambda w, h: outer(w))
        agree(grad, bl.hypergradient(problem, ridge(h, X, y), h, inner_args=(X, y), solver=solver).grad)

    def test_damping_may_be_traced(self, case):
        h, X, y, outer = case
        grad = jax.grad(jax.jit(lambda h, damping: objectives(outer, bl.CG(rtol=1e-12, damping=damping))[0](h, X, y)))
        problem = bl.Problem(inner, lambda w, h: outer(w))
        hg = bl.hypergradient(problem, ridge(h, X, y), h, inner_args=(X, y), solver=bl.CG(rtol=1e-12, damping=0.5))
        agree(grad(h, 0.5), hg.grad)


class TestTraining:
    def test_it_may_be_anything_that_runs_on_the_host(self, case):
        h, X, y, outer = case

        def scipy_like(h, X, y):
            assert float(y[0]) == y[0]  # no tracer
            X, y, decay = np.asarray(X), np.asarray(y), np.asarray(h["decay"])
            return {"w": jnp.asarray(np.linalg.solve(X.T @ X / ROWS + np.diag(np.exp(decay)), X.T @ y / ROWS))}

        ours, exact = objectives(outer, train=scipy_like)
        agree(jax.grad(ours)(h, X, y), jax.grad(exact)(h, X, y))

    def test_it_may_be_a_loop_that_has_no_reverse_mode(self, case):
        h, X, y, outer = case

        def descend(h, X, y):
            def live(state):
                return jnp.linalg.norm(jax.grad(inner)(state, h, X, y)["w"]) > 1e-13

            return jax.lax.while_loop(
                live,
                lambda w: jax.tree.map(lambda a, g: a - 0.05 * g, w, jax.grad(inner)(w, h, X, y)),
                {"w": jnp.zeros(3)},
            )

        ours, exact = objectives(outer, train=descend)
        agree(jax.jit(jax.grad(ours))(h, X, y), jax.grad(exact)(h, X, y))

    def test_arguments_may_be_anything(self, case):
        h, X, y, outer = case
        ours, exact = objectives(outer)
        rest = (jnp.arange(3), jnp.array(True), jax.random.key(0), "word", None, 3, {"flag": False})
        agree(jax.grad(lambda h: ours(h, X, y, *rest))(h), jax.grad(exact)(h, X, y))
        agree(
            jax.jit(jax.grad(lambda h, numbers, flag, key: ours(h, X, y, numbers, flag, key)))(h, *rest[:3]),
            jax.grad(exact)(h, X, y),
        )

    def test_a_gradient_takes_one_training_and_one_solve_and_leaves_the_rest_alone(self, case):
        h, X, y, outer = case
        trainings, solves = [], []

        class Counted(bl.LinearSolver):  # someone else's solver
            def init(self, A):
                return TIGHT.init(A)

            def solve(self, state, A, b, x0):
                jax.debug.callback(lambda: solves.append(1))
                return TIGHT.solve(state, A, b, x0)

        def counted(h, X, y, poison):
            trainings.append(1)
            return ridge(h, X, y)

        def poisoned(w, h, X, y, poison):  # no finite derivative by the last argument
            return inner(w, h, X, y) + jnp.sqrt(poison) * jnp.sum(w["w"])

        solve = bilevel_jax.implicit_minimizer(poisoned, solver=Counted())(counted)
        grad = jax.grad(lambda h: outer(solve(h, X, y, jnp.zeros(()))))(h)
        jax.effects_barrier()
        assert (len(trainings), len(solves)) == (1, 1)
        agree(grad, jax.grad(objectives(outer)[1])(h, X, y))

    def test_eager_gradients_compile_once(self, case):
        h, X, y, outer = case
        traces = []

        def counted(w, h, X, y):
            traces.append(1)
            return inner(w, h, X, y)

        solve = bilevel_jax.implicit_minimizer(counted)(ridge)
        counts = []
        for shift in (0.0, 0.1, 0.2):
            jax.grad(lambda h: outer(solve(h, X, y)))({"decay": h["decay"] + shift})
            counts.append(len(traces))
        assert counts[2] - counts[1] == counts[1] - counts[0] == 1  # it looks for what is closed over

    def test_a_solver_comes_from_a_file(self, case, tmp_path):
        h, X, y, outer = case
        path = tmp_path / "solver.toml"
        path.write_text('[solver]\nname = "exact"')
        ours, exact = objectives(outer, path)
        agree(jax.grad(ours)(h, X, y), jax.grad(exact)(h, X, y))


class TestArguments:
    """The training has keyword arguments, defaults, and an auxiliary result."""

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda f, h, X, y: f(h, X, y=y), id="one by keyword"),
            pytest.param(lambda f, h, X, y: f(h, y=y, X=X), id="data by keyword"),
            pytest.param(lambda f, h, X, y: f(X=X, y=y, h=h), id="all by keyword"),
            pytest.param(lambda f, h, X, y: f(h, X, y, shift=0.0, steps=7), id="more than inner takes"),
        ],
    )
    def test_keywords_reach_the_training_and_the_loss(self, case, call):
        h, X, y, outer = case

        def loss(w, h, X, y, shift=0.0):
            return inner(w, h, X, y + shift)

        def train(h, X, y, shift=0.0, *, steps=1):
            return ridge(h, X, y + shift)

        solve = bilevel_jax.implicit_minimizer(loss, solver=TIGHT)(train)
        for grad in (jax.grad, lambda *f: jax.jit(jax.grad(*f))):
            ours = grad(lambda h, y: outer(call(solve, h, X, y)), (0, 1))(h, y)
            agree(ours, jax.grad(lambda h, y: outer(ridge(h, X, y)), (0, 1))(h, y))

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_an_auxiliary_result_has_no_derivative(self, case, transform):
        h, X, y, outer = case

        def train(h, X, y):
            w = ridge(h, X, y)
            return w, {"losses": [inner(w, h, X, y)], "steps": jnp.array(3)}

        solve = bilevel_jax.implicit_minimizer(inner, solver=TIGHT, has_aux=True)(train)

        def total(h):
            w, aux = solve(h, X, y)
            return outer(w) + aux["losses"][0], aux

        grad, aux = transform(jax.grad(total, has_aux=True))(h)
        agree(grad, jax.grad(lambda h: outer(ridge(h, X, y)))(h))
        assert aux["steps"] == 3
        agree(aux["losses"], [inner(ridge(h, X, y), h, X, y)])

    @pytest.mark.parametrize(
        ("returned", "has_aux", "text"),
        [
            (
                lambda w: (w, 0.5),
                False,
                r"train returned a tuple of 2, where \[1\] is a float\. Return only the params",
            ),
            (lambda w: {**w, "epochs": 3}, False, r"train returned a dict, where \['epochs'\] is an int\."),
            (lambda w: object(), False, r"train returned an object\. Return the params"),
            (lambda w: w, True, r"train returned a dict\. With has_aux=True, return \(params, aux\)"),
        ],
        ids=["loss", "extras", "estimator", "no aux"],
    )
    def test_more_than_params_is_named(self, case, returned, has_aux, text):
        h, X, y, _ = case

        def train(h, X, y):
            return returned(ridge(h, X, y))

        with pytest.raises(TypeError, match=text):
            bilevel_jax.implicit_minimizer(inner, has_aux=has_aux)(train)(h, X, y)

    def test_a_tuple_of_arrays_is_noted_where_the_loss_cannot_use_it(self, case):
        h, X, y, _ = case

        def train(h, X, y):
            return ridge(h, X, y), jnp.zeros(())

        with pytest.raises(TypeError) as caught:
            bilevel_jax.implicit_minimizer(inner)(train)(h, X, y)
        assert (
            "train returned a tuple of 2, and inner received params[0]['w'] of shape (3,) and params[1] of shape ()."
        ) in "".join(caught.value.__notes__)

    def test_wrong_uses_of_the_decorator_are_told(self, case):
        h, X, y, _ = case
        with pytest.raises(TypeError, match=r"expected the inner loss, a function of \(params, hparams\), got a str"):
            bilevel_jax.implicit_minimizer("cg")
        with pytest.raises(
            TypeError, match=r"implicit_minimizer\(ridge\) expects a training function, got a dict, an Arr"
        ):
            bilevel_jax.implicit_minimizer(ridge)(h, X, y)
        train = bilevel_jax.implicit_minimizer(inner)(lambda h, X, y: ridge(h, X, y))
        with pytest.raises(TypeError, match=r"the training\(h, X, y\): got an unexpected keyword argument 'Y'"):
            train(h, X, y, Y=y)


def run_jitted(grad, *args):
    """Wait for what the callbacks of a jitted function say, too."""
    jax.block_until_ready(jax.jit(grad)(*args))
    jax.effects_barrier()


class TestFailure:
    def grad(self, case, solver, on_failure):
        h, X, y, outer = case
        solve = bilevel_jax.implicit_minimizer(inner, solver=solver, on_failure=on_failure)(ridge)
        return jax.grad(lambda h, X: outer(solve(h, X, y))), h, X

    @pytest.mark.parametrize(
        ("solver", "text"),
        [
            (bl.CG(maxiter=1), "CG: stopped after 1 step above its tolerance.*Raise maxiter"),
            (bl.Neumann(step_size=9.0), "Neumann: diverged.*must stay below 2 over the largest eigenvalue"),
        ],
    )
    def test_it_warns_raises_or_is_quiet(self, case, solver, text):
        grad, h, X = self.grad(case, solver, "warn")
        with pytest.warns(bl.SolverWarning, match=text):
            grad(h, X)
        with pytest.warns(bl.SolverWarning, match=text):
            run_jitted(grad, h, X)
        grad, *_ = self.grad(case, solver, "raise")
        with pytest.raises(bl.SolverError, match=text):
            grad(h, X)
        with pytest.raises(Exception, match=f"(?s)SolverError: {text}"):
            run_jitted(grad, h, X)
        grad, *_ = self.grad(case, solver, "ignore")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_jitted(grad, h, X)

    @pytest.mark.parametrize("on_failure", ["warn", "raise"])
    def test_the_host_is_not_called_for_a_solve_that_converged(self, case, on_failure, monkeypatch):
        def called(*_, **__):
            raise AssertionError

        monkeypatch.setattr("bilevel_jax.implicit_system.report", called)
        h, X, y, outer = case
        solve = bilevel_jax.implicit_minimizer(inner, on_failure=on_failure)(ridge)
        grad = jax.grad(lambda h: outer(solve(h, X, y)))
        hs = jax.tree.map(lambda a: jnp.stack([a, a + 1]), h)
        for call, at in ((grad, h), (jax.jit(grad), h), (jax.vmap(grad), hs), (jax.jit(jax.vmap(grad)), hs)):
            jax.block_until_ready(call(at))
        jax.effects_barrier()

    @pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.jit(jax.vmap(f))], ids=["vmap", "jit of vmap"])
    def test_a_batch_tells_its_worst_solve_once(self, transform):
        """The second example has negative curvature, and the third needs more steps than the first."""
        slopes = jnp.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 2.0, 3.0]])

        def grad(curvatures, solver):
            def loss(w, h):
                return jnp.sum(curvatures * w**2) / 2 - jnp.sum(h * w)

            solve = bilevel_jax.implicit_minimizer(loss, solver=solver)(lambda h: h / curvatures)
            return jax.grad(lambda h: jnp.sum(solve(h)))(jnp.ones(3))

        def told(batch, solver):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                jax.block_until_ready(transform(lambda c: grad(c, solver))(batch))
                jax.effects_barrier()
            return [str(warning.message) for warning in caught]

        [text] = told(slopes, bl.CG(maxiter=1, damping=0.0))
        assert "met non-positive curvature" in text
        [text] = told(slopes[::2], bl.CG(maxiter=1))
        assert "above its tolerance" in text
        assert told(slopes[:1], bl.CG(maxiter=1)) == []

    def test_a_traced_option_is_a_number_in_the_message(self):
        def total(h, damping):
            solver = bl.CG(damping=damping)
            concave = bilevel_jax.implicit_minimizer(lambda w, h: jnp.sum(h * w) - jnp.sum(w**2), solver=solver)
            return concave(lambda h: h / 2)(h).sum()

        with pytest.warns(bl.SolverWarning, match=r"raise damping above 0\.5,"):
            run_jitted(jax.grad(total), jnp.ones(2), 0.5)
        dampings = jnp.array([3.0, 0.25])
        with pytest.warns(bl.SolverWarning, match=r"raise damping above 0\.25,"):
            run_jitted(jax.vmap(jax.grad(total), (None, 0)), jnp.ones(2), dampings)

    def test_negative_curvature_is_named(self):
        concave = bilevel_jax.implicit_minimizer(lambda w, h: jnp.sum(h * w) - jnp.sum(w**2), solver=bl.CG(damping=0.0))
        solve = concave(lambda h: h / 2)
        with pytest.warns(bl.SolverWarning, match='definite: use damping="auto", add damping, train'):
            jax.grad(lambda h: solve(h).sum())(jnp.ones(2))

    def test_nan_raises_and_is_never_a_number(self, case):
        grad, h, X = self.grad(case, "cg", "warn")
        with pytest.raises(bl.SolverError, match="nan or infinity in the losses"):
            grad(h, X * jnp.nan)
        grad, *_ = self.grad(case, "cg", "ignore")
        for call in (grad, jax.jit(grad)):
            assert jnp.isnan(call(h, X * jnp.nan)["decay"]).all()


class TestRefused:
    def test_what_is_no_linear_solver(self):
        with pytest.raises(TypeError, match=r"Unrolled runs inner steps.*use bl\.hypergradient"):
            bilevel_jax.implicit_minimizer(inner, solver="unrolled")

    def test_a_solver_that_keeps_a_state(self):
        with pytest.raises(TypeError, match=r"WarmStart keeps a state.*adjoint0=hg\.adjoint.*bl\.prepare"):
            bilevel_jax.implicit_minimizer(inner, solver=bl.WarmStart("cg"))

    def test_a_traced_number_of_steps(self, case):
        h, X, y, outer = case
        with pytest.raises(TypeError, match=r"CG\.maxiter: expected an integer >= 0, got .* static under jit"):
            jax.jit(lambda n: objectives(outer, bl.CG(maxiter=n))[0](h, X, y))(3)

    def test_an_unknown_word(self):
        with pytest.raises(ValueError, match='on_failure: expected "raise", "warn" or "ignore"'):
            bilevel_jax.implicit_minimizer(inner, on_failure="quiet")  # pyright: ignore

    @pytest.mark.parametrize(
        ("inner", "train", "hparams", "error", "text"),
        [
            (lambda w, h: jnp.sum(h), lambda h: h, 1.0, ValueError, "inner does not depend on params"),
            (lambda w, h: w, lambda h: h, 1.0, ValueError, r"inner: expected a scalar, got .* \(2,\)"),
            (lambda w, h: 1.0, lambda h: h, 1.0, TypeError, "inner: expected a scalar array, got float"),
            (
                lambda w, h: (w.sum(), 1),
                lambda h: h,
                1.0,
                TypeError,
                r"got tuple\. Return the loss alone, without aux\.",
            ),
            (
                lambda w, h: jnp.sum(w**2),
                lambda h: h,
                1.0,
                ValueError,
                r"∂inner/∂params does not depend on hparams\['a'\].*no influence on the minimum",
            ),
            (
                lambda w, h: jnp.sum(w**2),
                lambda h: (h["a"], jnp.arange(2)),
                1.0,
                TypeError,
                r"the training returned a tuple of 2, where \[1\] is of int.*Return only the params, or .*has_aux=True",
            ),
            (
                lambda w, h: jnp.sum(w**2),
                lambda h: "done",
                1.0,
                TypeError,
                r"the training returned a str\. Return the params\.",
            ),
            (lambda w, h: jnp.sum(w**2), lambda h: None, 1.0, TypeError, "returned None. Return the params"),
            (lambda w, h: jnp.sum(w**2), lambda h: h, 1, TypeError, r"hparams\['a'\]: expected a floating-point leaf"),
        ],
    )
    def test_what_cannot_be_differentiated(self, inner, train, hparams, error, text):
        values = {"a": jnp.full(2, hparams)}
        unwrapped = lambda w, h: inner(w["a"] if isinstance(w, dict) else w, h["a"])  # noqa: E731
        with pytest.raises(error, match=text):
            bilevel_jax.implicit_minimizer(unwrapped)(train)(values)

    def test_hparams_that_are_closed_over_and_not_used(self, case):
        h, X, y, _ = case
        solve = bilevel_jax.implicit_minimizer(lambda w, _: inner(w, h, X, y))(lambda h: ridge(h, X, y))
        with pytest.raises(ValueError, match=r"hparams\['decay'\].*Use the hparams argument inside inner"):
            solve(h)
