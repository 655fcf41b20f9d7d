"""Losses with a `jax.custom_vjp` whose rule calls another one: they have no forward mode of the gradient."""

import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
bilevel_jax = pytest.importorskip("bilevel_jax")
from jax.experimental.ode import odeint  # noqa: E402

TIGHT = bl.CG(rtol=1e-12)
H = jnp.array([0.3, -0.2, 0.5])
DATA = jnp.array([-1.0, -2.0, -0.5])  # so that the minima are positive


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square(x) * g,))


@jax.custom_vjp
def once(x):
    return x**3


def slow_square(x, g):
    """Multiply by 3 x² in a loop of unknown length: no reverse mode."""
    return (
        jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + square(x) * g), (0, jnp.zeros_like(x)))[1],
    )


once.defvjp(lambda x: (x**3, x), slow_square)


def decayed(rate):
    """exp(-rate), by an ODE solver."""
    return odeint(lambda y, t, rate: -rate * y, jnp.ones_like(rate), jnp.array([0.0, 1.0]), rate, rtol=1e-9, atol=1e-9)[
        1
    ]


def loss(power):
    return lambda w, h, data: jnp.sum(power(w)) / 6 + jnp.sum(jnp.exp(h) * w**2 + data * w)


def outer(w, h=None):
    return jnp.sum((w - 1) ** 2 * jnp.array([1.0, 2.0, 3.0]))


INNER, PLAIN = loss(cube), loss(lambda w: w**3)
LOSSES = {
    "rule in a rule": (INNER, PLAIN, 1e-9),
    "ode": (loss(lambda w: 6 * decayed(w)), loss(lambda w: 6 * jnp.exp(-w)), 1e-5),
}


def fitted(inner):
    """A training by Newton's method on a loss that JAX differentiates in any way."""

    def train(h, data):
        w = jnp.ones(3) / 2
        for _ in range(20):
            slope = jax.grad(inner)
            w = w - jnp.linalg.solve(jax.jacobian(slope)(w, h, data), slope(w, h, data))
        return w

    return train


class TestReverseOverReverse:
    """The solver of differential equations is compiled for half a minute. So it has only one test."""

    @pytest.mark.parametrize("inner", [INNER, LOSSES["ode"][0]], ids=LOSSES)
    def test_the_loss_has_no_forward_mode(self, inner):
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(jax.grad(inner), (DATA, H, DATA), (DATA, H, DATA))

    @pytest.mark.parametrize(("inner", "plain", "tolerance"), LOSSES.values(), ids=LOSSES)
    def test_a_hypergradient(self, inner, plain, tolerance):
        w = fitted(plain)(H, DATA)
        ours, expected = (bl.Problem(f, outer) for f in (inner, plain))
        exact = bl.hypergradient(expected, w, H, inner_args=(DATA,), solver="exact").grad
        assert relative_error(bl.hypergradient(ours, w, H, inner_args=(DATA,), solver=TIGHT).grad, exact) <= tolerance

    @pytest.mark.parametrize(
        "transform",
        [
            pytest.param(lambda f: jax.grad(f, (0, 1)), id="eager"),
            pytest.param(lambda f: lambda h, d: jax.vmap(jax.grad(f), (0, None))(h[None], d)[0], id="vmap"),
        ],
    )
    def test_an_implicit_minimizer(self, transform):
        train = fitted(PLAIN)
        solve = bilevel_jax.implicit_minimizer(INNER, solver=TIGHT)(train)
        closed = bilevel_jax.implicit_minimizer(PLAIN, solver="exact")(train)
        ours, exact = (transform(lambda h, data, f=f: outer(f(h, data)))(H, DATA) for f in (solve, closed))
        for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
            assert relative_error(x, expected) <= 1e-9

    def test_an_unroll(self):
        solver = bl.Unrolled(steps=5, step_size=0.1)
        ours, exact = (
            bl.hypergradient(bl.Problem(f, outer), jnp.ones(3), H, inner_args=(DATA,), solver=solver).grad
            for f in (INNER, PLAIN)
        )
        assert relative_error(ours, exact) <= 1e-9

    def test_diagnose(self):
        w = fitted(PLAIN)(H, DATA)
        report = bl.diagnose(bl.Problem(INNER, outer), w, H, inner_args=(DATA,), solver=TIGHT)
        assert report.ok, report


def test_values_that_are_closed_over_are_differentiated():
    train = fitted(PLAIN)

    def total(inner, h, data):
        solve = bilevel_jax.implicit_minimizer(lambda w, shift: inner(w, h, data + shift), solver=TIGHT)
        return outer(solve(lambda shift: train(h, data + shift))(jnp.zeros(3)))

    ours, exact = (jax.jit(jax.grad(lambda h, f=f: total(f, h, DATA)))(H) for f in (INNER, PLAIN))
    assert relative_error(ours, exact) <= 1e-9


def test_a_failed_solve_warns():
    solve = bilevel_jax.implicit_minimizer(INNER, solver=bl.CG(maxiter=1))(fitted(PLAIN))
    with pytest.warns(bl.SolverWarning, match="above its tolerance"):
        jax.grad(lambda h: outer(solve(h, DATA)))(H)


def test_forward_mode_is_an_error_of_jax():
    solve = bilevel_jax.implicit_minimizer(INNER)(fitted(PLAIN))
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jacfwd(lambda h: outer(solve(h, DATA)))(H)


class TestNoSecondDerivative:
    WAYS = r'JAX has no second derivative of inner.*"finite-differences".*bl\.Root.*DirectAdjoint.*JAX raised: '
    inner = staticmethod(loss(once))
    W = jnp.ones(3) / 2

    @pytest.mark.parametrize("solver", ["cg", bl.Unrolled(steps=2, step_size=0.1)], ids=["cg", "unrolled"])
    @pytest.mark.parametrize("call", [bl.hypergradient, bl.diagnose])
    def test_the_ways_out_are_named(self, call, solver):
        with pytest.raises(TypeError, match=self.WAYS):
            call(bl.Problem(self.inner, outer), self.W, H, inner_args=(DATA,), solver=solver)

    def test_an_implicit_minimizer_names_them(self):
        solve = bilevel_jax.implicit_minimizer(self.inner)(lambda h, data: self.W)
        with pytest.raises(TypeError, match=self.WAYS):
            jax.grad(lambda h: outer(solve(h, DATA)))(H)

    def test_gauss_newton_products_name_them(self):
        def model(w, h, x):
            return cube(w) * x

        problem = bl.Problem.from_model(model, lambda z: jnp.sum(z**2), outer, penalty=lambda w, h: jnp.sum(h * w**2))
        with pytest.raises(TypeError, match=self.WAYS.replace("second derivative of inner", "forward mode of model")):
            bl.hypergradient(problem, self.W, H, inner_args=(DATA,))

    def test_finite_differences_work(self):
        problem = bl.Problem(self.inner, outer, curvature="finite-differences")
        exact = bl.Problem(loss(lambda w: w**3), outer)
        ours, expected = (bl.hypergradient(p, self.W, H, inner_args=(DATA,)).grad for p in (problem, exact))
        assert relative_error(ours, expected) <= 1e-5

    def test_a_root_works(self):
        problem = bl.Root(lambda w, h, data: w**2 / 2 + 2 * jnp.exp(h) * w + data, outer)
        exact = bl.Problem(loss(lambda w: w**3), outer)
        ours = bl.hypergradient(problem, self.W, H, inner_args=(DATA,), solver="exact").grad
        assert relative_error(ours, bl.hypergradient(exact, self.W, H, inner_args=(DATA,)).grad) <= 1e-5

    def test_an_error_of_the_loss_itself_is_passed_on(self):
        def wrong(w, h):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            bl.hypergradient(bl.Problem(wrong, outer), self.W, H)


def test_a_wrong_second_derivative_of_jax_is_found_with_its_cause():
    """Where the arguments of hypot are equal, its Hessian is zero in JAX 0.10 (findings/)."""
    problem = bl.Problem(
        lambda w, h: jnp.hypot(w[0], w[1]) + (jnp.exp(h) * (w - 1) ** 2).sum(), lambda w, h: ((w - 2) ** 2).sum()
    )
    w, h = jnp.array([1.0, 1.0]), jnp.array(0.0)
    hessian = jax.hessian(lambda w: jnp.hypot(w[0], w[1]))(w)
    if hessian.any():
        pytest.skip(f"JAX {jax.__version__} has this second derivative")
    found = {finding.name: finding for finding in bl.diagnose(problem, w, h).findings}
    assert "inner hvp contradicts differences" in found["wrong derivative"].what
    assert "hypot or betaln of equal arguments" in found["wrong derivative"].way_out
