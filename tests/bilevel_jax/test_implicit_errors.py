"""`implicit_minimizer`: what it says where a solve fails, and where it cannot differentiate."""

import warnings

import pytest

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

from implicit_ridge import data, inner, ridge  # noqa: E402


@pytest.fixture(scope="module")
def case():
    return data()


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
        h, X, y, _ = case
        with pytest.raises(TypeError, match=r"CG\.maxiter: expected an integer >= 0, got .* static under jit"):
            jax.jit(lambda n: bilevel_jax.implicit_minimizer(inner, solver=bl.CG(maxiter=n))(ridge)(h, X, y))(3)

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
