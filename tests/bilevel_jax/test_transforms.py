"""A hypergradient inside the user's own transformations: checkpoints, traced options, donated buffers, one trace."""

from functools import partial

import pytest
from frameworks import relative_error

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
from jax_ridge import PROBLEM, inner, outer, point  # noqa: E402


def case(seed=0):
    w, h, train, validation = point(seed)
    return w, h, {"inner_args": train, "outer_args": validation}


def counted():
    traces = []

    def counted_inner(w, h, X, y):
        traces.append(1)
        return inner(w, h, X, y)

    return bl.Problem(counted_inner, outer), traces


def test_checkpointed_losses_change_nothing():
    w, h, data = case()
    plain = bl.hypergradient(PROBLEM, w, h, **data)
    remat = bl.hypergradient(bl.Problem(jax.checkpoint(inner), jax.checkpoint(outer)), w, h, **data)
    assert relative_error(remat.grad, plain.grad) <= 1e-12


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda rtol, damping: bl.CG(rtol=rtol, damping=damping), [(1e-2, 0.5), (1e-9, 0.1)]),
        (lambda step, damping: bl.Neumann(terms=8, step_size=step, damping=damping), [(0.1, 0.2), (0.2, 0.0)]),
    ],
)
def test_options_may_be_traced_and_do_not_trace_again(make, values):
    w, h, data = case()
    problem, traces = counted()

    @jax.jit
    def call(first, second):
        return bl.hypergradient(problem, w, h, solver=make(first, second), **data)

    for i, options in enumerate(values):
        hg = call(*options)
        eager = bl.hypergradient(PROBLEM, w, h, solver=make(*options), **data)
        assert relative_error(hg.grad, eager.grad) <= 1e-12
        if i == 0:
            once = len(traces)
    assert len(traces) == once


def test_options_may_differ_along_a_batch():
    w, h, data = case()

    def call(damping):
        return bl.hypergradient(PROBLEM, w, h, solver=bl.CG(damping=damping), **data).grad

    dampings = jnp.array([0.1, 1.0])
    mapped = jax.vmap(call)(dampings)
    for i in range(2):
        assert relative_error(mapped[i], call(float(dampings[i]))) <= 1e-12


def test_a_whole_outer_step_is_one_jit_with_donated_buffers():
    """Training by a scan, hypergradient with a warm start, and update: traced once, as the loop in Python."""
    _, _, data = case()
    problem, traces = counted()

    def step(problem, params, velocity, hparams, adjoint):
        def descend(state, _):
            w, m = state
            m = 0.9 * m - 0.05 * jax.grad(problem.inner)(w, hparams, *data["inner_args"])
            return (w + m, m), None

        (params, velocity), _ = jax.lax.scan(descend, (params, velocity), length=20)
        hg = bl.hypergradient(problem, params, hparams, adjoint0=adjoint, solver="cg", **data)
        return params, velocity, hparams - 0.1 * hg.grad, hg.adjoint

    def start():
        return jnp.zeros(4), jnp.zeros(4), -jnp.ones(4), jnp.zeros(4)

    jitted = jax.jit(partial(step, problem), donate_argnums=(0, 1, 2, 3))
    state, plain = start(), start()
    for i in range(3):
        given = state
        state = jitted(*state)
        assert all(buffer.is_deleted() for buffer in given)
        plain = step(PROBLEM, *plain)
        if i == 0:
            once = len(traces)
    assert len(traces) == once
    for ours, expected in zip(state, plain, strict=True):
        assert relative_error(ours, expected) <= 1e-10


def test_a_collective_that_would_be_differentiated_wrongly_is_refused():
    w, h, data = case()
    problem = bl.Problem(lambda *a: jax.lax.pmean(inner(*a), "batch"), outer)

    def call(X, y):
        return bl.hypergradient(problem, w, h, inner_args=(X, y), outer_args=data["outer_args"]).grad

    X, y = data["inner_args"]
    with pytest.raises(ValueError, match="inner: JAX differentiates psum over the axis 'batch' correctly only inside"):
        jax.vmap(call, axis_name="batch")(X.reshape(3, 4, 4), y.reshape(3, 4))


def test_a_collective_over_an_axis_of_the_losses_own_is_fine():
    """As of a batch normalisation: it never leaves the loss."""
    w, h, data = case()

    def centred(w, h, X, y):
        errors = jax.vmap(lambda x, t: (e := x @ w - t) - jax.lax.pmean(e, "rows"), axis_name="rows")(X, y)
        return jnp.mean(errors**2) + jnp.sum(jnp.exp(h) * w**2)

    def by_hand(w, h, X, y):
        errors = X @ w - y
        return jnp.mean((errors - errors.mean()) ** 2) + jnp.sum(jnp.exp(h) * w**2)

    ours, expected = (bl.hypergradient(bl.Problem(f, outer), w, h, **data).grad for f in (centred, by_hand))
    assert relative_error(ours, expected) <= 1e-10


@pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "gmres", "exact"])
def test_a_derivative_of_a_hypergradient_names_the_way_to_it(solver):
    w, h, data = case()

    def total(h):
        return jnp.sum(bl.hypergradient(PROBLEM, w, h, solver=solver, **data).grad)

    def each(hs):
        return jnp.sum(jax.vmap(total)(hs))

    with pytest.raises(
        NotImplementedError, match=r"bilevel_jax\.implicit_minimizer, which has derivatives of all orders"
    ):
        jax.jit(jax.grad(total))(h)
    with pytest.raises(NotImplementedError, match="implicit_minimizer"):
        jax.grad(each)(h[None])


def test_the_value_has_a_derivative():
    w, h, data = case()
    grad = jax.grad(lambda w: bl.hypergradient(PROBLEM, w, h, **data).value)(w)
    assert relative_error(grad, jax.grad(outer)(w, h, *data["outer_args"])) <= 1e-12


def test_forward_mode_goes_through_a_solver():
    """At params that stay: the loop of a solver has a forward mode in JAX."""
    w, h, data = case()

    def grad(h):
        return bl.hypergradient(PROBLEM, w, h, solver=bl.CG(rtol=1e-13), **data).grad

    def exact(h):
        hessian = jax.hessian(inner)(w, h, *data["inner_args"])
        v = jnp.linalg.solve(hessian, jax.grad(outer)(w, h, *data["outer_args"]))
        return -jax.grad(lambda h: jnp.vdot(jax.grad(inner)(w, h, *data["inner_args"]), v))(h)

    assert relative_error(jax.jacfwd(grad)(h), jax.jacfwd(exact)(h)) <= 1e-8


@pytest.mark.parametrize("solver", [bl.CG(damping=0.0), bl.Neumann(), bl.Nystrom()], ids=repr)
def test_forward_mode_tells_a_failed_solve(solver):
    """The status is a number there, but norms are traced."""
    w, h, data = case()
    problem = bl.Problem(lambda w, h, *data: -inner(w, h, *data), outer)

    def grad(on_failure):
        return lambda h: bl.hypergradient(problem, w, h, solver=solver, on_failure=on_failure, **data).grad

    with pytest.raises(bl.SolverError, match=r": .*It stopped after"):
        jax.jacfwd(grad("raise"))(h)
    with pytest.warns(bl.SolverWarning, match=r"For the numbers, see hg.info"):
        jax.jacfwd(grad("warn"))(h)


@pytest.mark.parametrize("jit", [False, True])
def test_a_solver_that_keeps_a_state_is_refused(jit):
    w, h, data = case()

    def call(w):
        return bl.hypergradient(PROBLEM, w, h, solver=bl.WarmStart("cg"), **data)

    with pytest.raises(TypeError, match=r"WarmStart keeps a state .*adjoint0=hg\.adjoint.*bl\.prepare"):
        (jax.jit(call) if jit else call)(w)
