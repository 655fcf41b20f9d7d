"""`implicit_minimizer`: against closed forms that JAX differentiates by itself, in all modes and orders."""

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

from implicit_ridge import ROWS, data, inner, ridge  # noqa: E402

TIGHT = bl.CG(rtol=1e-12)


@pytest.fixture(scope="module")
def case():
    return data()


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
