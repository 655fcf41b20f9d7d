"""``damping="auto"``: undamped where the operator curves up, and twice the negative curvature where it does not."""

import dataclasses

import cases
import numpy as np
import pytest
from frameworks import DTYPES, framework, relative_error, solve, symmetric
from hypothesis import given
from hypothesis import strategies as st

import bilevel as bl
from bilevel import Status
from bilevel.linear_solvers.auto_damping import ATTEMPTS, FACTOR, GROWTH, KEPT, SLACK, next_damping
from bilevel.linearization import Linearization
from bilevel.operators.lanczos import PRODUCTS
from bilevel.operators.linear_operator import LinearOperator

SOLVERS = {
    "cg": bl.CG(),
    "minres": bl.MINRES(damping="auto"),
    "gmres": bl.GMRES(damping="auto"),
    "bicgstab": bl.BiCGStab(damping="auto"),
    "neumann": bl.Neumann(terms=1000, rtol=1e-4, damping="auto"),
    "nystrom": bl.Nystrom(rank=12, damping="auto"),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
LOW = 0.3
INDEFINITE = [-LOW, -0.1, 0.2, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0]
seeds = st.integers(0, 2**32 - 1)


def rhs_of(size, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def accepted(matrix, rhs, x, info, rtol=1e-5):
    """Return the residual of the damped system, and the largest that the stop rule accepts, in float64."""
    x = np.asarray(x, np.float64)
    left = np.linalg.norm(rhs - matrix @ x - info.damping * x)
    return left, max(rtol * np.linalg.norm(rhs), SLACK * info.damping * np.linalg.norm(x))


@each_solver
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_twice_the_negative_curvature(backend, solver, dtype):
    """With 12 unknowns, Lanczos' method finds λmin to rounding."""
    matrix, rhs = symmetric(INDEFINITE).astype(dtype), rhs_of(12, dtype=dtype)
    x, info = solve(backend, solver, matrix, rhs)
    assert info.damping == pytest.approx(2 * LOW, rel=1e-3)
    assert info.status == Status.CONVERGED
    left, most = accepted(matrix.astype(np.float64), rhs, x, info, solver.rtol)
    assert left <= 1.01 * most
    assert x.dtype == dtype
    if not isinstance(solver, bl.Nystrom):  # it has zero in place of a negative eigenvalue
        exact = np.linalg.solve(matrix + info.damping * np.eye(12), rhs)
        assert relative_error(x, exact) <= 2 * SLACK  # an error of δ/10 in A, where A + δ >= δ/2


@each_solver
def test_a_tight_tolerance_at_the_found_damping_gives_the_exact_solution(backend, solver):
    matrix, rhs = symmetric(INDEFINITE), rhs_of(12)
    damping = solve(backend, solver, matrix, rhs)[1].damping
    x, _ = solve(backend, bl.CG(damping=damping, rtol=1e-13), matrix, rhs)
    assert relative_error(x, np.linalg.solve(matrix + damping * np.eye(12), rhs)) <= 1e-11


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, low=st.floats(1e-3, 3.0))
def test_the_damped_system_is_solved(backend, dtype, seed, low):
    matrix, rhs = symmetric([*INDEFINITE[2:], -low, 0.0], seed).astype(dtype), rhs_of(12, seed, dtype)
    x, info = solve(backend, bl.CG(), matrix, rhs)
    left, most = accepted(matrix.astype(np.float64), rhs, x, info)
    assert (info.status, left <= 1.05 * most) == (Status.CONVERGED, True)
    # A right-hand side can hide the lowest direction, to the tolerance of the stop rule.
    assert 0 <= info.damping <= 4.01 * low
    assert np.vdot(x, matrix @ x + info.damping * x) > 0


@each_solver
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_definite_system_is_not_damped(backend, solver, dtype):
    matrix, rhs = symmetric(np.geomspace(0.1, 4, 12)).astype(dtype), rhs_of(12, dtype=dtype)
    x, info = solve(backend, solver, matrix, rhs)
    assert info.status == Status.CONVERGED
    if isinstance(solver, bl.Nystrom):  # it divides by its damping
        assert info.damping == pytest.approx(0.1, rel=1e-3)
        return
    assert info.damping == 0
    assert relative_error(x, np.linalg.solve(matrix.astype(np.float64), rhs)) <= 1e-3


def test_cg_without_negative_curvature_gives_the_same_bits(backend):
    matrix, rhs = symmetric(np.geomspace(0.1, 4, 12)), rhs_of(12)
    x, info = solve(backend, bl.CG(), matrix, rhs)
    plain, expected = solve(backend, bl.CG(damping=0.0), matrix, rhs)
    assert (x == plain).all()
    assert info == expected._replace(inner_grad_norm=info.inner_grad_norm, value_error=info.value_error)


@each_solver
def test_singular_systems_without_a_solution_are_no_success(backend, solver):
    matrix = symmetric([0.0, 0.0, 0.5, 1.0, 2.0, 3.0])
    x, info = solve(backend, solver, matrix, rhs_of(6))
    assert np.isfinite(x).all()
    if not isinstance(solver, bl.Nystrom):  # it has a damping
        assert (info.damping, info.status == Status.CONVERGED) == (0, False)


@each_solver
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_it_has_the_units_of_the_operator(backend, solver, scale):
    matrix, rhs = symmetric(INDEFINITE), rhs_of(12)
    x, info = solve(backend, solver, matrix, rhs)
    scaled, again = solve(backend, solver, scale * matrix, scale * rhs)
    assert again.damping == pytest.approx(scale * info.damping, rel=1e-6)
    assert relative_error(scaled, x) <= 1e-6


@each_solver
def test_zero_and_nan(backend, solver):
    matrix = symmetric(INDEFINITE)
    x, info = solve(backend, solver, matrix, np.zeros(12))
    assert not x.any()
    assert info.status == Status.CONVERGED
    _, info = solve(backend, solver, np.full_like(matrix, np.nan), rhs_of(12))
    assert info.status == Status.NON_FINITE


def test_the_steps_are_the_products():
    """Apart from warm starts and checks, as for every solver."""
    problem = bl.problems.quadratic(hessian=symmetric(INDEFINITE), coupling=np.eye(12), target=rhs_of(12))
    calls = []
    inner = problem.inner

    class Counted(type(inner)):
        def hvp(self, *args):
            calls.append(1)
            return super().hvp(*args)

    counted = bl.Problem(Counted(*dataclasses.astuple(inner)), problem.outer)
    hg = bl.hypergradient(counted, np.zeros(12), np.zeros(12))
    assert hg.info.damping == pytest.approx(2 * LOW, rel=1e-3)
    assert hg.info.steps <= len(calls) <= hg.info.steps + 2
    undamped = bl.hypergradient(counted, np.zeros(12), np.zeros(12), solver=bl.CG(damping=0.0), on_failure="ignore")
    fixed = bl.hypergradient(counted, np.zeros(12), np.zeros(12), solver=bl.CG(damping=hg.info.damping))
    assert hg.info.steps <= undamped.info.steps + min(12, PRODUCTS) + fixed.info.steps


def test_the_estimate_is_repeated_if_it_was_too_small(backend):
    """The low direction is nearly absent from the right-hand side, and 300 eigenvalues hide it from 12 products."""
    eigenvalues = np.concatenate([[-0.01], np.linspace(-1e-4, 1, 299)])
    x, info = solve(backend, bl.CG(), np.diag(eigenvalues), np.concatenate([[1e-6], np.ones(299)]))
    assert info.status == Status.CONVERGED
    left, most = accepted(np.diag(eigenvalues), np.concatenate([[1e-6], np.ones(299)]), x, info)
    assert left <= 1.01 * most
    assert info.steps <= ATTEMPTS * (200 + PRODUCTS)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_warm_start_keeps_it(name):
    backend = framework(name)
    case = cases.quadratic(backend, INDEFINITE)
    solver = bl.WarmStart("cg")
    first, second = (case.hypergradient(solver).info for _ in range(2))
    assert first.damping == pytest.approx(2 * LOW, rel=1e-3)
    assert second.damping == pytest.approx(KEPT * first.damping)
    assert second.steps < first.steps - 12  # neither the undamped solve nor the estimate
    restored = bl.WarmStart("cg")
    restored.load_state_dict(solver.state_dict())
    third, again = (case.hypergradient(s).info for s in (solver, restored))
    assert third == again
    assert third.damping == pytest.approx(KEPT * second.damping)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_kept_damping_follows_the_hessian(name):
    backend = framework(name)
    flat, steep = (cases.quadratic(backend, [low, *INDEFINITE[2:]]) for low in (-0.01, -1.0))
    solver = bl.WarmStart("cg")
    dampings = [case.hypergradient(solver).info.damping for case in (flat, steep, *[flat] * 80)]
    assert dampings[0] < 0.03
    assert dampings[1] >= 1.0  # the kept damping was too small
    assert dampings[-1] < 0.1
    solver.reset()
    assert flat.hypergradient(solver).info.damping == dampings[0]


@pytest.mark.parametrize("error", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 5.0])
def test_the_next_damping_is_twice_the_noise_of_the_curvature(backend, noise, error):
    """The noise is ‖(A − A₀) v‖ / ‖v‖, without the part that the residual of v explains."""
    old, v, rng, damping = symmetric(INDEFINITE), rhs_of(12, 2), np.random.default_rng(3), 0.7
    new = old + noise * symmetric(np.linspace(-1, 1, 12), 5)
    unsolved = error * rng.standard_normal(12)
    image, left = old @ v + unsolved, np.linalg.norm(unsolved)
    change = np.linalg.norm(new @ v - image)
    expected = FACTOR * np.sqrt(max(change**2 - left**2, 0)) / np.linalg.norm(v)
    expected = np.clip(expected, KEPT * damping, GROWTH * damping)

    def compute(backend, new, v, image, left):
        A = LinearOperator(backend.space(v), lambda v: new @ v)
        return next_damping(A, damping, v, image, left)

    arrays = [backend.from_numpy(np.asarray(a)) for a in (new, v, image, left)]
    assert backend.to_numpy(backend.run(compute, *arrays)) == pytest.approx(expected, rel=1e-6)
    if noise == error == 0:
        assert expected == KEPT * damping


def loop(name, solver, matrices, rhs=None):
    """Return the infos of solves with matrices in turn, and the number of products."""
    backend, calls, infos = framework(name), [], []
    rhs = backend.from_numpy(rhs_of(12) if rhs is None else rhs)
    for each in matrices:
        matrix = backend.from_numpy(each)
        lin = Linearization(rhs[0], rhs, None, lambda v, matrix=matrix: calls.append(1) or matrix @ v, lambda v: v)
        infos.append(bl.hypergradient_from(lin, solver=solver, on_failure="ignore").info)
    return infos, len(calls)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_loop_over_batches_damps_twice_their_noise(name):
    """The Hessians of the batches are H ± ν I in turn. So the noise along any v is 2 ν."""
    noise = 0.6
    batches = [symmetric([-0.1, *INDEFINITE[2:], 0.9]) + sign * noise * np.eye(12) for sign in (1, -1)] * 12
    infos, _ = loop(name, bl.WarmStart("cg"), batches[1:])
    assert [float(info.damping) for info in infos[-4:]] == pytest.approx([FACTOR * 2 * noise] * 4, rel=0.05)
    alone = [float(info.damping) for info in loop(name, "cg", batches[:4])[0]]
    assert alone == pytest.approx([0, 2 * (noise + 0.1)] * 2, rel=1e-3)  # single batches do not show the noise


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_new_right_hand_sides_are_no_noise_of_the_hessian(name):
    solver, matrix = bl.WarmStart("cg"), symmetric(INDEFINITE)
    dampings = [float(loop(name, solver, [matrix], rhs_of(12, seed))[0][0].damping) for seed in range(6)]
    assert dampings[-1] <= KEPT**3 * dampings[0]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_few_steps_are_no_noise_of_the_hessian(name):
    solver = bl.WarmStart(bl.CG(maxiter=3, rtol=None))
    infos = loop(name, solver, [symmetric(INDEFINITE)] * 8)[0][2:]  # the first two do not meet negative curvature
    assert infos[0].residual_norm > 10 * infos[0].rhs_norm
    found = [float(info.damping) for info in infos]
    assert found == pytest.approx([2 * LOW * KEPT**k for k in range(6)], rel=1e-3)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_convex_loop_takes_no_more_products(name):
    batches = [symmetric(np.geomspace(0.1, 4, 12)) + shift * np.eye(12) for shift in (0.0, 0.5)] * 3
    infos, products = loop(name, bl.WarmStart("cg"), batches)
    assert [info.damping for info in infos] == [0] * 6
    assert products == loop(name, bl.WarmStart(bl.CG(damping=0.0)), batches)[1]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_solve_that_is_not_finite_leaves_the_kept_damping(name):
    solver, matrix = bl.WarmStart("cg"), symmetric(INDEFINITE)
    before = loop(name, solver, [matrix])[0][0].damping
    failed = loop(name, solver, [np.full_like(matrix, np.nan)])[0][0]
    after = loop(name, solver, [matrix])[0][0]
    assert failed.status == Status.NON_FINITE
    assert after.status == Status.CONVERGED
    assert KEPT**2 * before <= after.damping * (1 + 1e-6) <= before


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_kept_damping_does_not_fall_below_the_sketch(name):
    case = cases.quadratic(framework(name), np.geomspace(0.1, 4, 12))
    solver = bl.WarmStart(bl.Nystrom(rank=6, rtol=None, damping="auto"))
    dampings = {float(case.hypergradient(solver).info.damping) for _ in range(3)}
    assert len(dampings) == 1


@pytest.mark.parametrize("name", ["neumann", "gmres", "bicgstab"])
def test_other_operators_need_a_number(backend, name):
    matrix, rhs = symmetric(INDEFINITE), rhs_of(12)
    with pytest.raises(TypeError, match=r'damping="auto" needs one symmetric operator.*Give the damping as a number'):
        solve(backend, SOLVERS[name], matrix, rhs, symmetric=False)


def test_a_list_of_batches_needs_a_number():
    case = cases.quadratic(framework("numpy"), INDEFINITE)
    with pytest.raises(TypeError, match="needs one symmetric operator"):
        case.hypergradient(SOLVERS["neumann"], inner_args=[(), ()])


@pytest.mark.parametrize("name", [*SOLVERS, "exact"])
def test_other_words_are_no_damping(name):
    choices = r'> 0 or "auto"' if name == "nystrom" else r'>= 0 or "auto"'
    choices = ">= 0" if name == "exact" else choices
    word = "auto" if name == "exact" else "automatic"
    with pytest.raises(TypeError, match=rf"damping: expected a finite number {choices}, got '{word}'"):
        bl.get_solver({"name": name, "damping": word})


def test_config():
    assert bl.get_solver({"name": "minres", "damping": "auto"}) == SOLVERS["minres"]
    assert bl.get_solver("cg") == bl.CG(damping="auto")


def test_info_tells_every_damping(backend):
    case = cases.quadratic(backend, np.linspace(1, 4, 6))
    for solver, damping in ((bl.CG(damping=0.5), 0.5), (bl.Nystrom(rank=6, damping=0.25), 0.25), ("identity", 0.0)):
        info = case.hypergradient(solver).info
        assert info.damping == damping
        assert info.as_dict()["damping"] == damping


def test_a_check_names_both_places_for_the_number():
    case = cases.quadratic(framework("numpy"), INDEFINITE)
    with pytest.raises(AssertionError, match=r"solver found a damping of 0\.6, .*pass\s+damping=0\.6 to the solver"):
        bl.testing.check_hypergradient(*case.at, **case.args)
    damping = case.hypergradient().info.damping
    bl.testing.check_hypergradient(*case.at, **case.args, solver=bl.CG(damping=damping), damping=damping)
