"""The sketch, the solver and the preconditioners made of it, and what one call hands on to the next."""

import numpy as np
import pytest
from cases import diagonal
from frameworks import DTYPES, framework, relative_error, solve, symmetric, tolerance
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status

seeds = st.integers(0, 2**32 - 1)
LOW_RANK = np.concatenate([np.geomspace(100, 1, 6), np.zeros(14)])


def rhs_of(size, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, rank=st.sampled_from([10, 20, 30]), damping=st.sampled_from([0.1, 10.0]))
def test_nystrom_is_exact_once_the_rank_is_reached(backend, dtype, seed, rank, damping):
    matrix, rhs = symmetric(LOW_RANK, seed).astype(dtype), rhs_of(20, seed, dtype)
    x, info = solve(backend, bl.Nystrom(rank=rank, damping=damping, seed=seed % 7), matrix, rhs)
    damped = matrix.astype(np.float64) + damping * np.eye(20)
    assert info.status == Status.CONVERGED
    assert info.steps == min(rank, 20)
    assert x.dtype == dtype
    assert relative_error(x, linalg.solve(damped, rhs)) <= tolerance(dtype, condition=1000)
    assert info.residual_norm == pytest.approx(
        np.linalg.norm(rhs - damped @ x), abs=tolerance(dtype, condition=100) * float(np.linalg.norm(rhs))
    )


@given(seed=seeds)
def test_the_sketch_stays_below_and_its_error_within_the_tail(backend, seed):
    # Frangella, Tropp & Udell (2023), proposition 2.2: A - Â is positive semi-definite, and small in expectation.
    eigenvalues = np.geomspace(10, 1e-3, 20)
    matrix, rhs = symmetric(eigenvalues, seed), rhs_of(20, seed)
    damping = 0.1
    x, _ = solve(backend, bl.Nystrom(rank=12, damping=damping), matrix, rhs)
    exact = linalg.solve(matrix + damping * np.eye(20), rhs)
    # norm((Â + δ)⁻¹ - (A + δ)⁻¹) <= norm(A - Â) / δ²; the thirteenth eigenvalue is 0.03.
    assert relative_error(x, exact) <= 1.0
    assert x @ rhs >= exact @ rhs * (1 - 1e-9)


def test_a_rank_that_is_too_small_for_the_damping_is_said(backend):
    matrix, rhs = symmetric(np.ones(20)), rhs_of(20)
    _, info = solve(backend, bl.Nystrom(rank=3, damping=0.01), matrix, rhs)
    assert info.status == Status.MAXITER
    assert info.residual_norm > info.rhs_norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_indefinite_hessian_is_said(backend, dtype):
    matrix, rhs = symmetric(np.append(LOW_RANK[:-1], -3)).astype(dtype), rhs_of(20, dtype=dtype)
    _, info = solve(backend, bl.Nystrom(rank=15, damping=0.1), matrix, rhs)
    assert info.status == Status.NEGATIVE_CURVATURE
    _, info = solve(backend, bl.Nystrom(rank=15, damping=300.0), matrix, rhs)
    assert info.status == Status.CONVERGED  # by its residual


@pytest.mark.parametrize(
    ("solver", "curvatures", "message"),
    [
        (
            bl.Nystrom(rank=1, damping=0.1),
            [1.0, 2.0, 3.0],
            r"Nystrom: did not solve .* raise rank or damping.* The residual is",
        ),
        (bl.Nystrom(rank=3), [1.0, 2.0, -3.0], r"Nystrom: met non-positive curvature.* raise damping above 3"),
        (bl.GMRES(restart=1), [1.0, -1.0], r"GMRES: stagnated .* Raise restart, loosen"),
        (
            bl.GMRES(restart=1, max_restarts=1),
            [1.0, 2.0, 3.0],
            r"GMRES: stopped after 1 .* Raise restart or max_restarts",
        ),
        (bl.BiCGStab(maxiter=1), [1.0, 2.0, 3.0], r"BiCGStab: stopped after 1 step .* Raise maxiter"),
        (bl.Neumann(terms=2, rtol=1e-3), [1.0, 2.0, 3.0], r"Neumann: stopped after 2 steps .* Raise terms"),
        (bl.Exact(), [1.0, 2.0, 0.0], r"Exact: did not solve .* There is no solution: the Hessian is singular"),
    ],
    ids=["rank", "indefinite", "stagnant", "cycles", "bicgstab", "neumann", "exact"],
)
def test_each_failure_names_its_cure(solver, curvatures, message):
    problem, w, h = diagonal(np.array(curvatures), framework("numpy"), hparams=1.0)
    with pytest.raises(bl.SolverError, match=message):
        bl.hypergradient(problem, w, h, solver=solver, on_failure="raise")


@pytest.mark.parametrize(("dtype", "damping"), [(np.float32, 0.5), (np.float64, 0.0)])
@given(seed=seeds)
def test_preconditioned_cg_matches_scipy(backend, dtype, damping, seed):
    """Each dtype has one damping, since JAX compiles each pair. The solver adds the damping alike in both dtypes."""
    matrix, rhs = symmetric(np.geomspace(0.1, 10, 12), seed).astype(dtype), rhs_of(12, seed, dtype)
    rtol = tolerance(dtype)
    exact = linalg.solve(matrix.astype(np.float64) + damping * np.eye(12), rhs)
    for preconditioner in (bl.NystromPreconditioner(rank=5), bl.DiagonalPreconditioner()):
        x, info = solve(backend, bl.CG(rtol=rtol, damping=damping, preconditioner=preconditioner), matrix, rhs)
        assert info.status == Status.CONVERGED
        assert x.dtype == dtype
        assert relative_error(x, exact) <= 200 * rtol


class TestFewerSteps:
    def test_nystrom_for_few_large_eigenvalues(self, backend):
        eigenvalues = np.concatenate([np.geomspace(1e4, 10, 15), np.linspace(0.5, 1, 45)])
        matrix, rhs = symmetric(eigenvalues), rhs_of(60)
        plain, sketched = (
            solve(backend, bl.CG(preconditioner=m), matrix, rhs)[1] for m in (None, bl.NystromPreconditioner(rank=20))
        )
        assert plain.status == sketched.status == Status.CONVERGED
        assert sketched.steps + 20 < plain.steps

    def test_a_diagonal_for_weight_decays_over_four_decades(self, backend):
        decays = np.geomspace(1e-2, 1e2, 60)
        matrix, rhs = symmetric(np.geomspace(1e-2, 1, 60)) + np.diag(decays), rhs_of(60)
        given_ = bl.DiagonalPreconditioner(diagonal=backend.from_numpy(decays))
        plain, estimated, known = (
            solve(backend, bl.CG(preconditioner=m), matrix, rhs)[1] for m in (None, bl.DiagonalPreconditioner(), given_)
        )
        assert plain.status == estimated.status == known.status == Status.CONVERGED
        assert estimated.steps + 10 < plain.steps / 2
        assert known.steps < plain.steps / 2

    def test_a_diagonal_hessian_takes_one_step(self, backend):
        matrix, rhs = np.diag(np.geomspace(1e-3, 1e3, 20)), rhs_of(20)
        x, info = solve(backend, bl.CG(rtol=1e-12, preconditioner=bl.DiagonalPreconditioner(samples=1)), matrix, rhs)
        assert (info.steps, info.status) == (1, Status.CONVERGED)
        assert relative_error(x, rhs / np.diag(matrix)) <= 1e-12


def test_negative_curvature_is_met_with_a_preconditioner_too(backend):
    matrix, rhs = symmetric([-1.0, 1, 2, 3, 4, 5]), rhs_of(6)
    for preconditioner in (bl.NystromPreconditioner(rank=3), bl.DiagonalPreconditioner()):
        x, info = solve(backend, bl.CG(damping=0.0, preconditioner=preconditioner), matrix, rhs)
        assert info.status == Status.NEGATIVE_CURVATURE
        assert x.any()


class TestPrepare:
    curvatures = np.array([1.0, 2.0, 8.0])

    def test_a_prepared_solver_gives_the_same(self, backend):
        problem, w, h = diagonal(self.curvatures, backend, hparams=1.0)
        for spec in (
            {"name": "neumann", "terms": 5, "damping": 0.5},
            {"name": "nystrom", "rank": 2},
            {"name": "cg", "preconditioner": "nystrom"},
            {"name": "cg", "preconditioner": "diagonal", "maxiter": 1},
            {"name": "cg"},
        ):
            solver = bl.get_solver(spec)
            prepared = bl.prepare(spec, problem, w, h)
            fresh, reused = (bl.hypergradient(problem, w, h, solver=s, on_failure="ignore") for s in (solver, prepared))
            np.testing.assert_allclose(backend.to_numpy(reused.grad), backend.to_numpy(fresh.grad), rtol=1e-12)
            assert reused.info.status == fresh.info.status

    def test_a_prepared_solver_spends_no_product_on_it(self):
        products = []
        problem, w, h = diagonal(self.curvatures, framework("numpy"), hparams=1.0)

        class Counting(type(problem.inner)):
            def hvp(self, *args):
                products.append(1)
                return super().hvp(*args)

        problem = bl.Problem(Counting(*vars(problem.inner).values()), problem.outer)
        for spec, most in (
            ({"name": "neumann", "terms": 5}, 5),
            ({"name": "nystrom", "rank": 3}, 1),
            ({"name": "cg", "preconditioner": {"name": "nystrom", "rank": 3}}, 4),
            ({"name": "cg", "preconditioner": "diagonal"}, 4),
        ):
            prepared = bl.prepare(spec, problem, w, h)
            products.clear()
            bl.hypergradient(problem, w, h, solver=prepared)
            assert len(products) <= most
            products.clear()
            bl.hypergradient(problem, w, h, solver=spec)
            assert len(products) > most

    def test_jax_compiles_once_for_several_sketches(self):
        backend = framework("jax")
        _, w, h = diagonal(self.curvatures, backend, hparams=1.0)
        traces = []

        def inner(w, h):
            traces.append(1)
            return (h * w**2).sum()

        problem = bl.Problem(inner, lambda w, h: w.sum())
        for solver in ("nystrom", {"name": "cg", "preconditioner": "nystrom"}):
            first, second = (bl.prepare(solver, problem, w, scale * h) for scale in (1.0, 2.0))
            bl.hypergradient(problem, w, h, solver=first)
            traces.clear()
            bl.hypergradient(problem, w, h, solver=second, on_failure="ignore")  # it is one for another Hessian
            assert not traces


class TestWhatASolverHolds:
    """A sketch or a diagonal that is not for these params is named, and never met by the framework."""

    def trees(self, backend):
        problem, w, h = diagonal(np.array([1.0, 2.0, 8.0]), backend, hparams=1.0)
        return problem, w, h, backend.from_numpy

    @pytest.mark.parametrize("solver", ["nystrom", {"name": "cg", "preconditioner": "nystrom"}])
    def test_a_sketch_of_other_params(self, backend, solver):
        problem, w, h, _ = self.trees(backend)
        for other in (
            diagonal(np.ones(5), backend, hparams=1.0),
            diagonal(np.ones(3), backend, hparams=1.0, dtype=np.float32),
        ):
            prepared = bl.prepare(solver, *other)
            with pytest.raises(
                ValueError,
                match=r"params: expected the structure of the params that the solver was prepared for",
            ):
                bl.hypergradient(problem, w, h, solver=prepared)

    def test_a_diagonal_of_other_params(self, backend):
        problem, w, h, move = self.trees(backend)
        for wrong, error, message in (
            (move(np.ones(4)), ValueError, r"preconditioner\.diagonal: expected the structure of params"),
            ({"a": move(np.ones(3))}, ValueError, r"preconditioner\.diagonal"),
            (move(np.ones(3, np.float32)), ValueError, r"preconditioner\.diagonal: .*float64; it has shape .*float32"),
            ("ones", ValueError, r"preconditioner\.diagonal: .*it has shape \(\) and type str"),
        ):
            with pytest.raises(error, match=message):
                bl.hypergradient(problem, w, h, solver=bl.CG(preconditioner=bl.DiagonalPreconditioner(diagonal=wrong)))

    def test_a_stale_sketch_is_said(self, backend):
        problem, w, h, move = self.trees(backend)
        prepared = bl.prepare(bl.Nystrom(damping=0.1), problem, w, h)
        moved = bl.problems.quadratic(
            hessian=move(np.diag([8.0, 2.0, 1.0])), coupling=move(np.eye(3)), target=move(np.ones(3))
        )
        with pytest.warns(bl.SolverWarning, match=r"did not solve the system .* prepare again"):
            hg = bl.hypergradient(moved, w, h, solver=prepared)
        assert hg.info.status == Status.MAXITER

    def test_a_solver_is_not_prepared_for_what_it_refuses(self):
        class Halve:
            def __call__(self, w, h):
                return w / 2 + h

            def vjp_params(self, w, h, v):
                return v / 2

            def vjp_hparams(self, w, h, v):
                return v

        problem, w, h, _ = self.trees(framework("numpy"))
        with pytest.raises(TypeError, match="Nystrom relies on a symmetric operator"):
            bl.prepare("nystrom", bl.FixedPoint(Halve(), problem.outer), w, h)


class TestExtrapolate:
    def test_a_line_is_continued(self, backend):
        new, old = ({"a": backend.from_numpy(np.array([x]))} for x in (3.0, 1.0))
        assert backend.to_numpy(bl.extrapolate(new, old)["a"]) == [5]
        assert bl.extrapolate(new, None) is new

    def test_unlike_trees_are_refused(self, backend):
        a = backend.from_numpy(np.ones(2))
        with pytest.raises(ValueError, match=r"previous\['a'\]: expected the structure of adjoint"):
            bl.extrapolate({"a": a}, {"b": a})


class TestBatches:
    """LiSSA: a new batch for each product."""

    def data(self, backend, seed=0):
        X = np.random.default_rng(seed).standard_normal((4, 30, 3)) + 1
        y = X @ np.arange(3.0)
        w, h = backend.from_numpy(np.ones(3)), backend.from_numpy(np.zeros(3))
        return [tuple(map(backend.from_numpy, batch)) for batch in zip(X, y, strict=True)], w, h

    def test_the_series_runs_through_the_batches(self, backend):
        batches, w, h = self.data(backend)
        problem, step = bl.problems.ridge(), 0.05
        hg = bl.hypergradient(
            problem, w, h, inner_args=batches, outer_args=batches[0], solver=bl.Neumann(terms=6, step_size=step)
        )
        X = [backend.to_numpy(x) for x, _ in batches]
        hessians = [x.T @ x / len(x) + np.eye(3) for x in X]
        _, y = (backend.to_numpy(a) for a in batches[0])
        term = total = X[0].T @ (X[0] @ np.ones(3) - y) / len(y)
        for j in range(6):  # the first batch is for the rest: the cross product, and a warm start
            term = term - step * hessians[(j + 1) % 4] @ term
            total = total + term
        np.testing.assert_allclose(backend.to_numpy(hg.adjoint), step * total, rtol=1e-12)
        assert hg.info.status == Status.CONVERGED

    def test_one_batch_in_a_list_is_that_batch(self, backend):
        batches, w, h = self.data(backend)
        solver = bl.Neumann(step_size=0.05)
        one, tuple_ = (
            bl.hypergradient(bl.problems.ridge(), w, h, inner_args=args, outer_args=batches[1], solver=solver)
            for args in (batches[:1], batches[0])
        )
        assert (backend.to_numpy(one.grad) == backend.to_numpy(tuple_.grad)).all()

    def test_no_tolerance_over_batches(self, backend):
        batches, w, h = self.data(backend)
        with pytest.raises(
            TypeError, match=r"Neumann\.rtol: with a new batch for each product, there is no single system"
        ):
            bl.hypergradient(
                bl.problems.ridge(), w, h, inner_args=batches, outer_args=batches[0], solver=bl.Neumann(rtol=1e-3)
            )

    def test_a_solver_of_one_system_refuses(self, backend):
        batches, w, h = self.data(backend)
        with pytest.raises(TypeError, match=r"inner_args is a list, .* but CG needs the same Hessian"):
            bl.hypergradient(bl.problems.ridge(), w, h, inner_args=batches, outer_args=batches[0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, exponent=st.integers(1, 5))
def test_neumann_stops_early_at_its_tolerance(backend, dtype, seed, exponent):
    matrix, rhs, rtol = symmetric(np.linspace(1, 3, 7), seed).astype(dtype), rhs_of(7, seed, dtype), 10.0**-exponent
    x, info = solve(backend, bl.Neumann(terms=200, rtol=rtol, step_size=0.4), matrix, rhs)
    true = np.linalg.norm(rhs - matrix.astype(np.float64) @ x)
    assert info.status == Status.CONVERGED
    assert info.steps < 60
    assert true <= rtol * np.linalg.norm(rhs)
    assert info.residual_norm == pytest.approx(true, abs=tolerance(dtype) * float(np.linalg.norm(rhs)))
    _, info = solve(backend, bl.Neumann(terms=3, rtol=1e-6, step_size=0.1), matrix, rhs)
    assert (info.steps, info.status) == (3, Status.MAXITER)
