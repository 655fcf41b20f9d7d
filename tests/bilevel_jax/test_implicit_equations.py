"""`implicit_root` and `implicit_fixed_point`: against closed forms, in all modes and orders."""

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")

A = np.array([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.0, 0.3, 4.0]])  # not symmetric
TIGHT = bl.GMRES(rtol=1e-13)


def solution(h, x):
    """The root of A w + h·w = x², in closed form, which JAX differentiates by itself."""
    return {"w": jnp.linalg.solve(A + jnp.diag(h["d"]), x**2)}


def residual(w, h, x):
    return {"w": A @ w["w"] + h["d"] * w["w"] - x**2}


def step(w, h, x):
    return {"w": w["w"] - 0.2 * residual(w, h, x)["w"]}


def outer(w):
    return jnp.sum(jnp.sin(w["w"])) + w["w"][0] * w["w"][1]


H, X = {"d": jnp.array([0.3, -0.2, 0.5])}, jnp.array([1.0, -0.5, 2.0])
ROOT = bilevel_jax.implicit_root(residual, TIGHT)(solution)
FIXED_POINT = bilevel_jax.implicit_fixed_point(step, TIGHT)(solution)
SOLVES = pytest.mark.parametrize("solve", [ROOT, FIXED_POINT], ids=["root", "fixed point"])


def agree(found, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize(
    ("solve", "transform"),
    [
        pytest.param(ROOT, lambda f: jax.jit(jax.grad(f, (0, 1))), id="root, jit of grad"),
        pytest.param(ROOT, lambda f: jax.grad(jax.jit(f), (0, 1)), id="root, grad of jit"),
        pytest.param(ROOT, lambda f: jax.jit(jax.jacfwd(f, (0, 1))), id="root, forward"),
        pytest.param(ROOT, lambda f: jax.jit(jax.hessian(f)), id="root, forward over reverse"),
        pytest.param(ROOT, lambda f: jax.jit(jax.vmap(jax.grad(f), ({"d": 0}, None))), id="root, vmap"),
        pytest.param(FIXED_POINT, lambda f: jax.grad(f, (0, 1)), id="fixed point, reverse"),
        pytest.param(FIXED_POINT, lambda f: jax.jit(jax.jacfwd(f, (0, 1))), id="fixed point, forward"),
        pytest.param(FIXED_POINT, lambda f: jax.jit(jax.jacrev(jax.jacrev(f))), id="fixed point, reverse over reverse"),
    ],
)
def test_all_modes_and_orders_match_the_closed_form(solve, transform, request):
    h = {"d": jnp.stack([H["d"], H["d"] + 1])} if "vmap" in request.node.callspec.id else H
    ours, exact = (transform(lambda h, x, f=f: outer(f(h, x)))(h, X) for f in (solve, solution))
    agree(ours, exact)


def test_a_jacobian_and_a_jvp_match_the_closed_form():
    ours, exact = (jax.jit(jax.jacrev(f))(H, X) for f in (ROOT, solution))
    agree(ours, exact)
    along = ({"d": jnp.ones(3)}, jnp.array([0.0, 1.0, -1.0]))
    agree(jax.jvp(ROOT, (H, X), along), jax.jvp(solution, (H, X), along))


@SOLVES
def test_float32(solve):
    h, x = jax.tree.map(lambda a: a.astype(jnp.float32), (H, X))
    f = bilevel_jax.implicit_root(residual) if solve is ROOT else bilevel_jax.implicit_fixed_point(step)
    found = jax.grad(lambda h: outer(f(solution)(h, x)))(h)
    assert found["d"].dtype == jnp.float32
    agree(found, jax.grad(lambda h: outer(solution(h, X)))(H), 1e-4)


def test_closed_over_values_keywords_and_an_auxiliary_result():
    def total(h, x):
        def shifted(w, shift, *, scale):
            return {"w": residual(w, h, x)["w"] - scale * shift}

        @bilevel_jax.implicit_root(shifted, TIGHT, has_aux=True)
        def solve(shift, *, scale=2.0, steps=3):
            w = jnp.linalg.solve(A + jnp.diag(h["d"]), x**2 + scale * shift)
            return {"w": w}, {"steps": steps, "start": w}

        w, aux = solve(jnp.sin(x), scale=3.0)
        assert aux["steps"] == 3
        return outer(w) + jnp.sum(aux["start"])  # aux has no derivative

    def exact(h, x):
        return outer({"w": jnp.linalg.solve(A + jnp.diag(h["d"]), x**2 + 3.0 * jnp.sin(x))})

    agree(jax.jit(jax.grad(total, (0, 1)))(H, X), jax.grad(exact, (0, 1))(H, X))


def test_a_function_without_a_forward_mode_has_a_reverse_mode():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, c: (jax.pure_callback(lambda x, c: 2 * x * c, x, x, c),))

    solve = bilevel_jax.implicit_root(lambda w, a: square(w) - a, TIGHT)(jnp.sqrt)
    agree(jax.grad(lambda a: solve(a).sum())(jnp.array([4.0, 9.0])), jnp.array([1 / 4, 1 / 6]))


def test_the_linear_solve_is_the_one_of_a_hypergradient():
    solver = {"name": "neumann", "terms": 3, "step_size": 1.0}
    grad = jax.grad(lambda h: outer(bilevel_jax.implicit_fixed_point(step, solver)(solution)(h, X)))(H)
    problem = bl.FixedPoint(step, lambda w, h: outer(w))
    agree(grad, bl.hypergradient(problem, solution(H, X), H, inner_args=(X,), solver=solver).grad)


class TestErrors:
    def test_a_solver_that_relies_on_symmetry(self):
        with pytest.raises(TypeError, match=r"CG relies on a symmetric operator.*gmres"):
            jax.grad(lambda h: outer(bilevel_jax.implicit_root(residual, "cg")(solution)(h, X)))(H)

    @pytest.mark.parametrize(
        ("decorate", "function", "text"),
        [
            (bilevel_jax.implicit_root, lambda w, h, x: w["w"], r"residual\['w'\]: expected the structure of params"),
            (
                bilevel_jax.implicit_root,
                lambda w, h, x: w,
                r"residual does not depend on hparams\['d'\].*on the root\. ",
            ),
            (
                bilevel_jax.implicit_fixed_point,
                lambda w, h, x: w,
                r"step does not depend on hparams.*on the fixed point",
            ),
            (bilevel_jax.implicit_fixed_point, lambda w, h, x: {"w": h["d"]}, "step does not depend on params"),
        ],
    )
    def test_a_function_that_defines_nothing(self, decorate, function, text):
        with pytest.raises(ValueError, match=text):
            decorate(function)(solution)(H, X)

    def test_a_failed_solve_is_reported(self):
        solve = bilevel_jax.implicit_root(residual, bl.GMRES(restart=1, max_restarts=1, rtol=1e-12))(solution)
        with pytest.warns(bl.SolverWarning, match="Raise restart or max_restarts"):
            jax.grad(lambda h: outer(solve(h, X)))(H)
        strict = bilevel_jax.implicit_root(lambda w, h, x: {"w": w["w"] * jnp.nan * h["d"]}, on_failure="raise")(
            solution
        )
        with pytest.raises(bl.SolverError):
            jax.grad(lambda h: outer(strict(h, X)))(H)
