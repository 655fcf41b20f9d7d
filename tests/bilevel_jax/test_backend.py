"""What JAX users rely on: jit, vmap, one trace, registered pytrees, float32 by default."""

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from frameworks import relative_error

import bilevel as bl
from bilevel import Status

jax = pytest.importorskip("jax")
jnp = jax.numpy
COMPILED = pytest.importorskip("bilevel_jax.backend").COMPILED
equations = pytest.importorskip("bilevel_jax.sharding").equations
from jax_ridge import PROBLEM, inner, outer  # noqa: E402
from jax_ridge import point as case  # noqa: E402

SOLVERS = ["cg", "minres", "neumann", "identity", "exact", "unrolled"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_jit_gives_the_same_as_eager(solver):
    w, h, train, val = case()
    call = partial(bl.hypergradient, PROBLEM, solver=solver)
    eager = call(w, h, inner_args=train, outer_args=val)
    jitted = jax.jit(lambda w, h, train, val: call(w, h, inner_args=train, outer_args=val))(w, h, train, val)
    assert relative_error(jitted.grad, eager.grad) <= 1e-12
    assert isinstance(jitted.info.status, jax.Array)
    assert int(jitted.info.status) == eager.info.status
    assert int(jitted.info.steps) == eager.info.steps


@pytest.mark.parametrize("solver", SOLVERS)
def test_vmap_gives_the_same_as_a_loop(solver):
    cases = [case(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *cases)
    call = partial(bl.hypergradient, PROBLEM, solver=solver)
    mapped = jax.vmap(lambda w, h, train, val: call(w, h, inner_args=train, outer_args=val))(*stacked)
    for i, (w, h, train, val) in enumerate(cases):
        one = call(w, h, inner_args=train, outer_args=val)
        assert relative_error(mapped.grad[i], one.grad) <= 1e-12
        assert int(mapped.info.status[i]) == one.info.status
        assert int(mapped.info.steps[i]) == one.info.steps


def test_under_jit_a_failure_speaks_through_the_status_only():
    w, h, train, val = case()

    @jax.jit
    def call(w, h):
        solver = bl.Neumann(terms=50, step_size=10.0)
        return bl.hypergradient(PROBLEM, w, h, inner_args=train, outer_args=val, solver=solver, on_failure="raise")

    hg = call(w, h)
    assert int(hg.info.status) == Status.DIVERGED
    nan = call(w, h * jnp.nan)
    assert int(nan.info.status) == Status.NON_FINITE
    assert not jnp.isfinite(nan.grad).any()


class TestTraces:
    """An eager call compiles once per problem, solver and shapes, whatever the numbers."""

    @pytest.fixture
    def counted(self):
        traces = []

        def counted_inner(w, h, X, y):
            traces.append(1)
            return inner(w, h, X, y)

        return bl.Problem(counted_inner, outer), traces

    def test_new_numbers_do_not_trace_again(self, counted):
        problem, traces = counted
        for seed in range(3):
            w, h, train, val = case(seed)
            bl.hypergradient(problem, w, h, inner_args=train, outer_args=val)
            if seed == 0:
                first = len(traces)
        assert len(traces) == first

    def test_numeric_options_do_not_trace_again(self, counted):
        problem, traces = counted
        w, h, train, val = case()
        counts = []
        for rtol, damping in ((1e-3, 0.1), (1e-6, 0.2)):
            solver = bl.CG(rtol=rtol, damping=damping)
            hg = bl.hypergradient(problem, w, h, inner_args=train, outer_args=val, solver=solver)
            counts.append(len(traces))
        assert counts[0] == counts[1]
        assert hg.info.residual_norm <= 1e-6 * hg.info.rhs_norm

    def test_an_equal_problem_built_anew_does_not_trace_again(self, counted):
        problem, traces = counted
        w, h, train, val = case()
        bl.hypergradient(problem, w, h, inner_args=train, outer_args=val)
        first = len(traces)
        bl.hypergradient(bl.Problem(problem.inner, problem.outer), w, h, inner_args=train, outer_args=val)
        assert len(traces) == first

    def test_programs_of_problems_made_anew_each_time_go_in_the_end(self):
        """With what their losses close over: a loop may make one per batch."""
        backend, (w, h, _, _) = bl.get_backend("jax"), case()

        def evaluate(backend, problem, w, h):  # compiles sooner than a hypergradient
            return problem.inner(w, h)

        losses = []
        for _ in range(COMPILED + 20):
            problem = bl.Problem(lambda w, h: jnp.sum(w * h), outer)
            losses.append(weakref.ref(problem.inner))
            backend.run(evaluate, problem, w, h)
        del problem
        gc.collect()
        assert sum(loss() is not None for loss in losses) <= COMPILED

    def test_python_arguments_stay_what_they_are(self):
        w, h, _, _ = case()
        problem = bl.Problem(
            lambda w, h, power, mode: (
                (w**2).sum() + sum(((w - h) ** 2).sum() for _ in range(power)) if mode == "sum" else (w**power).sum()
            ),
            lambda w, h: (w**2).sum(),
        )
        one = bl.hypergradient(problem, w, h, inner_args=(1, "sum"))
        three = bl.hypergradient(problem, w, h, inner_args=(3, "sum"))
        assert relative_error(three.grad, one.grad * (2 / 4) * 3 * (2 / 2) * (4 / 8) * 2) <= 1e-5
        flag = bl.hypergradient(problem, w, h, inner_args=(True, "sum"))
        assert relative_error(flag.grad, one.grad) <= 1e-12

    def test_an_argument_that_jit_cannot_hold_still_works(self):
        w, h, train, val = case()
        problem = bl.Problem(lambda w, h, box: inner(w, h, *box.data), outer)

        class Box:
            __hash__ = None  # pyright: ignore

            def __init__(self, data):
                self.data = data

        hg = bl.hypergradient(problem, w, h, inner_args=(Box(train),), outer_args=val)
        plain = bl.hypergradient(PROBLEM, w, h, inner_args=train, outer_args=val)
        assert relative_error(hg.grad, plain.grad) <= 1e-12


def test_registered_pytrees_are_trees():
    @jax.tree_util.register_dataclass
    @dataclass
    class Params:
        w: jax.Array

    w, h, train, val = case()
    problem = bl.Problem(lambda p, h, X, y: inner(p.w, h, X, y), lambda p, h, X, y: outer(p.w, h, X, y))
    hg = bl.hypergradient(problem, Params(w), h, inner_args=train, outer_args=val)
    assert isinstance(hg.adjoint, Params)


def test_a_module_with_more_than_arrays_names_the_way_to_its_arrays():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(4, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    text = r"params\.activation: expected an array of jax.* eqx\.filter\(module, eqx\.is_inexact_array\) in Equinox"
    with pytest.raises(TypeError, match=text):
        bl.hypergradient(PROBLEM, module, jnp.ones(()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_promotes_ranks(solver):
    """For those who set JAX_NUMPY_RANK_PROMOTION=raise."""
    w, h, train, val = case()
    with jax.numpy_rank_promotion("raise"):
        bl.hypergradient(PROBLEM, w, h, inner_args=train, outer_args=val, solver=solver)


def test_closed_over_hparams_are_refused_under_jit_too():
    w, h, train, val = case()
    problem = bl.Problem(lambda w, _, X, y: inner(w, h, X, y), outer)
    with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
        jax.jit(lambda w, h: bl.hypergradient(problem, w, h, inner_args=train, outer_args=val))(w, h)


def test_jitted_losses_hide_no_dependence():
    w, h, train, val = case()
    problem = bl.Problem(jax.jit(inner), jax.jit(outer))
    hg = bl.hypergradient(problem, w, h, inner_args=train, outer_args=val)
    plain = bl.hypergradient(PROBLEM, w, h, inner_args=train, outer_args=val)
    assert relative_error(hg.grad, plain.grad) <= 1e-12


def test_the_default_float32_is_right():
    """Without JAX_ENABLE_X64, as users have it."""
    code = """
import jax.numpy as jnp, numpy as np, bilevel as bl
H, B, t = np.diag([1.0, 2.0, 4.0]), np.arange(6.0).reshape(3, 2), np.ones(3)
problem = bl.problems.quadratic(*map(jnp.asarray, (H, B, t)))
w = np.linalg.solve(H, B @ np.ones(2))
for solver in ("cg", bl.Neumann(terms=200), "exact", bl.Unrolled(steps=200)):
    hg = bl.hypergradient(problem, jnp.asarray(w), jnp.ones(2), solver=solver)
    assert hg.grad.dtype == jnp.float32, hg.grad.dtype
    np.testing.assert_allclose(hg.grad, B.T @ np.linalg.solve(H, w - t), rtol=1e-5)
"""
    env = {**os.environ, "JAX_ENABLE_X64": "0"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)


def test_a_lambda_behind_stop_gradient_or_integers_has_no_influence():
    w, h, train, val = case()
    for cut in (jax.lax.stop_gradient, lambda h: h.astype(int).astype(float)):
        problem = bl.Problem(lambda w, h, X, y, cut=cut: inner(w, cut(h), X, y), outer)
        with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
            bl.hypergradient(problem, w, h, inner_args=train, outer_args=val)
    problem = bl.Problem(lambda w, h, X, y: inner(jax.lax.stop_gradient(w), h, X, y), outer)
    with pytest.raises(ValueError, match="inner does not depend on params"):
        bl.hypergradient(problem, w, h, inner_args=train, outer_args=val)


@pytest.mark.parametrize(
    "argument",
    [jax.nn.relu, jnp.tanh, jax.jit(jnp.sin), np.dtype("float32"), np.int64(3)],
    ids=["custom_jvp", "jitted", "jitted twice", "dtype", "int64"],
)
def test_functions_and_numbers_of_numpy_among_the_arguments_do_not_trace_again(argument):
    traces = []

    def counted(w, h, X, y, extra):
        traces.append(1)
        return inner(w, h, X, y)

    problem, (w, h, train, val) = bl.Problem(counted, outer), case()
    for repeat in range(3):
        bl.hypergradient(problem, w, h, inner_args=(*train, argument), outer_args=val)
        if repeat == 0:
            first = len(traces)
    assert len(traces) == first


class TestConvolutions:
    """On CPUs XLA's code for their derivatives takes some ten times as long inside a loop."""

    W, X = jnp.ones((2, 1, 3, 3)) / 9, jax.random.normal(jax.random.key(0), (2, 1, 6, 6))

    @staticmethod
    def inner(w, h, x):
        z = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")
        return jnp.mean(jnp.tanh(z) ** 2) + jnp.sum(jnp.exp(h) * w**2)

    def call(self, solver, h):
        problem = bl.Problem(self.inner, lambda w, h: jnp.sum(w**2))
        return bl.hypergradient(problem, self.W, h, inner_args=(self.X,), solver=solver, on_failure="ignore").grad

    def loops_with_convolutions(self, solver):
        """The loops that are left in the program."""
        jaxpr = jax.make_jaxpr(partial(self.call, solver))(self.W * 0).jaxpr
        loops = [e for e in equations(jaxpr) if e.primitive.name == "while"]
        loops += [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["unroll"] < e.params["length"]]
        return [e for e in loops if "conv_general_dilated" in str(e)]

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a loop costs nothing")
    @pytest.mark.parametrize(
        "short",
        [bl.Neumann(terms=5, step_size=0.1), bl.Neumann(terms=5), bl.Unrolled(steps=5, step_size=0.1)],
        ids=repr,
    )
    def test_a_short_loop_of_products_is_unrolled(self, short):
        longer = replace(short, **{"terms" if isinstance(short, bl.Neumann) else "steps": 50})
        assert not self.loops_with_convolutions(short)
        assert self.loops_with_convolutions(longer)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a loop costs nothing")
    def test_the_first_sweep_of_an_iterative_solver_is_unrolled(self):
        sweeps = self.loops_with_convolutions(bl.CG(maxiter=5, damping=0.0))  # that of the restarts, and its own within
        assert len(sweeps) == 2
        assert len(self.loops_with_convolutions(bl.CG(maxiter=50, damping=0.0))) == 3

    def test_the_result_is_that_of_a_loop(self):
        short = bl.Neumann(terms=20, step_size=0.2)
        longer = bl.Neumann(terms=60, step_size=0.2, rtol=1e-12)
        exact = self.call("exact", self.W * 0)
        assert relative_error(self.call(longer, self.W * 0), exact) <= 1e-10
        assert relative_error(self.call(short, self.W * 0), exact) <= 2e-4
        for cg in (bl.CG(maxiter=20, rtol=1e-13), bl.CG(maxiter=50, rtol=1e-13)):  # without and with a loop
            assert relative_error(self.call(cg, self.W * 0), exact) <= 1e-10
