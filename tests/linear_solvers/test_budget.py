"""``rtol=None``: the maximum number of steps is a budget, and using it up is no failure."""

import cases
import numpy as np
import pytest
from frameworks import framework, relative_error, solve, symmetric

import bilevel as bl
from bilevel import Status

STEPS = 4
EIGENVALUES = np.geomspace(1e-3, 1, 30)
SOLVERS = {
    "cg": bl.CG(maxiter=STEPS, rtol=None),
    "minres": bl.MINRES(maxiter=STEPS, rtol=None),
    "gmres": bl.GMRES(restart=2, max_restarts=2, rtol=None),
    "bicgstab": bl.BiCGStab(maxiter=STEPS, rtol=None),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@each_solver
def test_all_steps_are_taken_and_the_residual_is_told(backend, solver):
    matrix, rhs = symmetric(EIGENVALUES), np.random.default_rng(0).standard_normal(30)
    x, info = solve(backend, solver, matrix, rhs)
    assert (info.steps, info.status) == (STEPS, Status.MAXITER)
    assert info.residual_norm == pytest.approx(np.linalg.norm(rhs - matrix @ x))
    zero, _ = solve(backend, bl.get_solver(solver, rtol=0.0), matrix, rhs)
    assert (x == zero).all()


@each_solver
def test_it_stops_at_a_solution(backend, solver):
    matrix, rhs = symmetric([1.0, 2.0, 1.0]), np.ones(3)
    x, info = solve(backend, solver, matrix, rhs)
    assert info.status == Status.CONVERGED
    assert info.steps < STEPS
    assert relative_error(x, np.linalg.solve(matrix, rhs)) <= 1e-12


@each_solver
@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_no_hypergradient_warns_or_raises(backend, solver, on_failure):
    case = cases.quadratic(backend, EIGENVALUES)
    assert case.hypergradient(solver, on_failure=on_failure).info.status == Status.MAXITER
    prepared = bl.prepare(solver, *case.at)
    assert case.hypergradient(prepared, on_failure=on_failure).info.status == Status.MAXITER


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_warm_start_needs_few_steps_per_call(name):
    case, solver = cases.quadratic(framework(name), np.geomspace(0.1, 1, 30)), bl.WarmStart(SOLVERS["cg"])
    left = [case.hypergradient(solver).info.residual_norm for _ in range(6)]
    assert solver.counts == {"MAXITER": 6}
    assert left[-1] < 0.01 * left[0]


def test_a_truncated_solve_is_what_was_asked_for():
    """Three steps of CG, by hand."""
    case = cases.quadratic(None, EIGENVALUES)
    b, H = case.params - case.target, case.matrix
    x, r = np.zeros(30), b
    p = r
    for _ in range(STEPS):
        alpha = (r @ r) / (p @ H @ p)
        x, new = x + alpha * p, r - alpha * H @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    assert relative_error(case.hypergradient(SOLVERS["cg"]).grad, case.direct + case.coupling.T @ x) <= 1e-12


def test_other_failures_are_told(backend):
    problem, w, h = cases.diagonal([1.0, -1.0], backend)
    with pytest.warns(bl.SolverWarning, match="met non-positive curvature"):
        bl.hypergradient(problem, w, h, solver=bl.CG(maxiter=STEPS, rtol=None, damping=0.0))
    for solver in SOLVERS.values():
        with pytest.raises(bl.SolverError, match="nan or inf"):
            bl.hypergradient(problem, w * np.nan, h, solver=solver)


def test_a_loop_in_torch_is_not_warned():
    torch = pytest.importorskip("torch")
    import bilevel_torch

    H = torch.tensor(symmetric(EIGENVALUES))
    w, h = (torch.ones(30, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = w @ H @ w / 2 - h @ w
    info = bilevel_torch.backward(loss, (w**2).sum(), [w], [h], solver=SOLVERS["cg"], on_failure="raise").info
    assert info.status == Status.MAXITER
    solve = bilevel_torch.implicit_minimizer(
        lambda w, h: w @ H @ w / 2 - h @ w, solver=SOLVERS["cg"], on_failure="raise"
    )(lambda h: torch.linalg.solve(H, h))
    (solve(h) ** 2).sum().backward()


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_a_minimizer_in_jax_is_not_warned(on_failure, monkeypatch):
    jax = pytest.importorskip("jax")
    import bilevel_jax

    H = jax.numpy.asarray(symmetric(EIGENVALUES))
    solve = bilevel_jax.implicit_minimizer(
        lambda w, h: w @ H @ w / 2 - h @ w, solver=SOLVERS["cg"], on_failure=on_failure
    )(lambda h: jax.numpy.linalg.solve(H, h))
    grad = jax.grad(lambda h: (solve(h) ** 2).sum())
    for call in (grad, jax.jit(grad)):
        jax.block_until_ready(call(jax.numpy.ones(30)))
    jax.effects_barrier()


def test_a_search_is_not_warned():
    case = cases.ridge(None, 30, 8)
    problem, args = case.problem, case.args
    solver = bl.CG(maxiter=2, rtol=None)
    found = bl.minimize(
        problem,
        case.hparams,
        fit=bl.scipy_fit(problem, inner_args=args["inner_args"]),
        params0=case.params,
        solver=solver,
        maxiter=3,
        **args,
    )
    assert {evaluation.status for evaluation in found.history} <= {Status.MAXITER, Status.CONVERGED}
    assert found.history[0].status == Status.MAXITER
    assert found.history[0].rtol is None


def test_diagnose_measures_the_residual():
    case = cases.quadratic(None, EIGENVALUES)
    [finding] = bl.diagnose(*case.at, solver=SOLVERS["cg"]).findings
    assert "The linear solve has a relative residual of" in finding.what
    easy = cases.quadratic(None, np.linspace(1, 1.1, 30))
    assert bl.diagnose(*easy.at, solver=SOLVERS["cg"]).ok


def test_no_tolerance_is_set():
    for solver in (*SOLVERS.values(), bl.Nystrom(rtol=None), bl.Neumann(rtol=None)):
        assert solver.with_rtol(1e-3) is solver
        assert not solver.failed(Status.MAXITER)
        assert solver.failed(Status.NEGATIVE_CURVATURE)
        assert bl.get_solver(solver, rtol=1e-3).failed(Status.MAXITER)


def test_the_sum_of_a_series_and_a_sketch_need_no_tolerance(backend):
    matrix, rhs = symmetric(EIGENVALUES), np.ones(30)
    x, info = solve(backend, bl.Nystrom(rank=3, rtol=None), matrix, rhs)
    expected, strict = solve(backend, bl.Nystrom(rank=3, rtol=1e-9), matrix, rhs)
    assert (x == expected).all()
    assert info[:4] == strict[:4]
    assert info.status == Status.MAXITER
    x, _ = solve(backend, bl.Neumann(terms=5, rtol=None), matrix, rhs)
    assert (x == solve(backend, bl.Neumann(terms=5), matrix, rhs)[0]).all()
