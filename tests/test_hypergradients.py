"""The hypergradients of many queries against closed forms and single calls, on every backend."""

import re
import warnings

import numpy as np
import pytest
from cases import Affine, SquaredDistance, mover
from frameworks import DTYPES, framework, relative_error, symmetric, tolerance

import bilevel as bl
from bilevel import Status
from bilevel.linear_solvers.auto_damping import SLACK
from bilevel.testing.conformance.problems import QUADRATIC

N, M, Q = 6, 4, 5


class Distances:
    """F_q = ½‖w − t_q‖² + d_q·λ."""

    def __call__(self, w, h, t, d):
        return 0.5 * ((w - t) ** 2).sum(1) + d @ h

    def grad(self, w, h, t, d):
        return w - t, d


MANY = bl.Problem(QUADRATIC.inner, Distances())
SINGLE = bl.Problem(QUADRATIC.inner, SquaredDistance())


class System:
    """A quadratic at its minimum with Q targets, and the answers from the dense Hessian."""

    def __init__(self, backend, dtype=np.float64, eigenvalues=(1.0, 1.6, 2.2, 2.8, 3.4, 4.0)):
        rng, move = np.random.default_rng(0), mover(backend, dtype)
        hessian, coupling, lam = symmetric(eigenvalues), rng.standard_normal((N, M)), rng.standard_normal(M)
        self.targets, self.direct = rng.standard_normal((Q, N)), rng.standard_normal((Q, M))
        w = np.linalg.solve(hessian, coupling @ lam)
        self.at = move(w, lam)
        self.data = move(hessian, coupling, np.zeros(N))
        self.adjoint = np.linalg.solve(hessian, (w - self.targets).T).T
        self.grad, self.value = self.direct + self.adjoint @ coupling, 0.5 * ((w - self.targets) ** 2).sum(1)
        self.value += self.direct @ lam
        self.move = move

    def many(self, solver="cg", targets=None, **options):
        outer_args = self.move(self.targets if targets is None else targets, self.direct)
        return bl.hypergradients(MANY, *self.at, inner_args=self.data, outer_args=outer_args, solver=solver, **options)

    def batches(self):
        return [self.move(*query) for query in zip(self.targets, self.direct, strict=True)]

    def single(self, q, solver="cg", **options):
        args = {"inner_args": self.data, "outer_args": self.batches()[q], "solver": solver, **options}
        return bl.hypergradient(SINGLE, *self.at, **args)


SOLVERS = {
    "cg": bl.CG(rtol=1e-12),
    "minres": bl.MINRES(rtol=1e-12),
    "gmres": bl.GMRES(restart=4, rtol=1e-12),
    "bicgstab": bl.BiCGStab(rtol=1e-12),
    "neumann": bl.Neumann(terms=60),
    "nystrom": bl.Nystrom(rank=4, damping=1.0, rtol=None),
    "exact": bl.Exact(),
    "identity": bl.Identity(scale=0.3),
    "preconditioned": bl.CG(rtol=1e-12, preconditioner=bl.NystromPreconditioner(rank=2)),
    "jacobi": bl.CG(rtol=1e-12, damping=0.1, preconditioner=bl.DiagonalPreconditioner()),
    "budget": bl.CG(maxiter=2, rtol=None),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_every_solver_equals_its_single_calls(backend, solver):
    system = System(backend)
    hg = system.many(solver)
    singles = [system.single(q, solver) for q in range(Q)]
    for name in ("grad", "adjoint"):
        rows = np.stack([backend.to_numpy(getattr(one, name)) for one in singles])
        assert relative_error(backend.to_numpy(getattr(hg, name)), rows) <= 1e-9, name
    assert list(hg.info.status) == [one.info.status for one in singles]
    steps = [one.info.steps for one in singles]
    if isinstance(solver, bl.CG) and solver.rtol is not None:  # a step takes the directions of all queries
        assert (hg.info.steps < steps).all()
    else:
        assert list(hg.info.steps) == steps
    for name in ("rhs_norm", "inner_grad_norm"):
        assert np.allclose(getattr(hg.info, name), [getattr(one.info, name) for one in singles], atol=1e-12), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_the_closed_form(backend, dtype):
    system = System(backend, dtype)
    hg = system.many(bl.CG(rtol=10 * float(np.finfo(dtype).eps)))
    assert relative_error(backend.to_numpy(hg.grad), system.grad) <= tolerance(dtype)
    assert relative_error(backend.to_numpy(hg.adjoint), system.adjoint) <= tolerance(dtype)
    assert relative_error(backend.to_numpy(hg.value), system.value) <= tolerance(dtype)
    assert backend.to_numpy(hg.grad).dtype == dtype
    assert hg.params is system.at[0]


def test_a_list_of_batches_is_one_query_for_each(backend):
    system = System(backend)
    hg = bl.hypergradients(
        SINGLE, *system.at, inner_args=system.data, outer_args=system.batches(), solver=bl.CG(rtol=1e-12)
    )
    assert relative_error(backend.to_numpy(hg.grad), system.grad) <= 1e-11
    assert relative_error(backend.to_numpy(hg.value), system.value) <= 1e-12


def test_a_fixed_point_and_a_list_of_inner_batches(backend):
    system, rng = System(backend), np.random.default_rng(1)
    A = rng.standard_normal((N, N))
    A *= 0.5 / np.linalg.norm(A, 2)
    B, c = rng.standard_normal((N, M)), np.zeros(N)
    w = backend.to_numpy(system.at[0])
    problem, args = bl.FixedPoint(Affine(), Distances()), system.move(system.targets, system.direct)
    hg = bl.hypergradients(
        problem, *system.at, inner_args=system.move(A, B, c), outer_args=args, solver=bl.GMRES(rtol=1e-12)
    )
    adjoint = np.linalg.solve((np.eye(N) - A).T, (w - system.targets).T).T
    assert relative_error(backend.to_numpy(hg.grad), system.direct + adjoint @ B) <= 1e-11

    batches = [system.data, system.move(2 * np.eye(N), backend.to_numpy(system.data[1]), c)]
    solver = bl.Neumann(terms=7, step_size=0.1)
    many = bl.hypergradients(MANY, *system.at, inner_args=batches, outer_args=args, solver=solver)
    one = system.single(2, solver, inner_args=batches)
    assert relative_error(backend.to_numpy(many.grad)[2], backend.to_numpy(one.grad)) <= 1e-12


def test_warm_starts_take_no_steps_and_prepared_solvers_no_sketch(backend):
    system = System(backend)
    first = system.many(bl.CG(rtol=1e-10))
    again = system.many(adjoint0=first.adjoint)
    assert not again.info.steps.any()
    assert relative_error(backend.to_numpy(again.grad), system.grad) <= 1e-9
    # Prepared for a Hessian twice as large: a step size that is computed again would be twice as long.
    hessian, *rest = (backend.to_numpy(array) for array in system.data)
    prepared = bl.prepare(bl.Neumann(terms=7), MANY, *system.at, inner_args=system.move(2 * hessian, *rest))
    step = float(backend.to_numpy(prepared.state))
    hg, expected = (backend.to_numpy(system.many(s).grad) for s in (prepared, bl.Neumann(terms=7, step_size=step)))
    assert relative_error(hg, expected) == 0


def test_a_right_hand_side_of_zero_and_one_query(backend):
    system = System(backend)
    targets = system.targets.copy()
    targets[1] = backend.to_numpy(system.at[0])
    hg = system.many(bl.CG(rtol=1e-12), targets)
    assert not backend.to_numpy(hg.adjoint)[1].any()
    assert hg.info.steps[1] == 0
    assert relative_error(backend.to_numpy(hg.adjoint)[2:], system.adjoint[2:]) <= 1e-11


def test_failures_are_reported_once_with_their_queries(backend):
    """The right-hand sides of the queries 1 and 3 meet a negative eigenvalue at once. The others do not."""
    system = System(backend, eigenvalues=(1.0, 1.0, 1.0, 1.0, 1.0, -1.0))
    vectors = np.linalg.eigh(backend.to_numpy(system.data[0]))[1].T  # in the order -1, 1, ...
    w = backend.to_numpy(system.at[0])
    targets = np.stack([w - vectors[2], w - vectors[0], w - vectors[3], w - vectors[0], w - vectors[4]])
    undamped = bl.CG(damping=0.0)
    expected = "CG for 2 queries of 5 (1 and 3): met non-positive curvature"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg = system.many(undamped, targets)
    said = [str(w.message) for w in caught if issubclass(w.category, bl.SolverWarning)]
    assert len(said) == 1
    assert said[0].startswith(expected)
    failed = Status.NEGATIVE_CURVATURE
    assert hg.info.status.tolist() == [Status.CONVERGED, failed, Status.CONVERGED, failed, Status.CONVERGED]
    with pytest.raises(bl.SolverError, match=re.escape(expected)):
        system.many(undamped, targets, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.SolverWarning)
        system.many(undamped, targets, on_failure="ignore")


def test_each_query_finds_its_damping(backend):
    """The queries 1 and 3 meet a negative eigenvalue. The others do not."""
    system = System(backend, eigenvalues=(1.0, 2.0, 3.0, 1.5, 2.5, -1.0))
    vectors = np.linalg.eigh(backend.to_numpy(system.data[0]))[1].T  # in the order -1, 1, ...
    w = backend.to_numpy(system.at[0])
    targets = np.stack([w - vectors[2], w - vectors[0] - vectors[1], w - vectors[3], w - vectors[0], w - vectors[4]])
    hg = system.many("cg", targets)
    assert hg.info.status.tolist() == [Status.CONVERGED] * 5
    np.testing.assert_allclose(hg.info.damping, [0, 2, 0, 2, 0], atol=1e-6)
    hessian, adjoints = backend.to_numpy(system.data[0]), backend.to_numpy(hg.adjoint)
    for x, damping, target in zip(adjoints, hg.info.damping, targets, strict=True):
        left = np.linalg.norm(w - target - hessian @ x - damping * x)
        assert left <= max(1e-5 * np.linalg.norm(w - target), 1.01 * SLACK * damping * np.linalg.norm(x))


def test_a_nan_in_one_query_leaves_the_others_alone(backend):
    """By a list: automatic derivatives of one vector of values multiply the nan by zeros."""
    system = System(backend)
    system.targets[3, 0] = np.nan
    args = {"inner_args": system.data, "outer_args": system.batches(), "solver": bl.CG(rtol=1e-12)}
    with pytest.raises(bl.SolverError, match=re.escape("CG for 1 query of 5 (3): nan or infinity")):
        bl.hypergradients(SINGLE, *system.at, **args)
    hg = bl.hypergradients(SINGLE, *system.at, **args, on_failure="ignore")
    others = [0, 1, 2, 4]
    assert relative_error(backend.to_numpy(hg.grad)[others], system.grad[others]) <= 1e-11
    assert hg.info.status.tolist() == [0, 0, 0, Status.NON_FINITE, 0]


def test_unsolved_params_are_warned_about(backend):
    system = System(backend)
    system.at = system.move(backend.to_numpy(system.at[0]) + 3.0, backend.to_numpy(system.at[1]))
    with pytest.warns(bl.InnerProblemWarning):
        system.many("exact")


def test_shapes_that_do_not_fit_are_named(backend):
    system = System(backend)
    options = {"inner_args": system.data, "outer_args": system.batches()[0]}
    with pytest.raises(ValueError, match=r"outer: expected an array of Q values.*shape \(\).*outer_args=\[\(x0, y0\)"):
        bl.hypergradients(SINGLE, *system.at, **options)
    with pytest.raises(ValueError, match=r"adjoint0.*\(5, 6\).*\(6,\)|adjoint0.*\(6,\).*\(5, 6\)"):
        system.many(adjoint0=system.at[0])
    with pytest.raises(ValueError, match=r"outer_args: the list has no batch"):
        bl.hypergradients(SINGLE, *system.at, inner_args=system.data, outer_args=[])
    with pytest.raises(TypeError, match=r"outer_args\[1\]: expected a tuple of arguments"):
        bl.hypergradients(SINGLE, *system.at, inner_args=system.data, outer_args=[system.batches()[0], 3])
    with pytest.raises(TypeError, match="outer is called with"):
        bl.hypergradients(MANY, *system.at, inner_args=system.data, outer_args=())


def test_solvers_without_one_linear_system_are_refused():
    system = System(framework("numpy"))
    with pytest.raises(TypeError, match="hypergradients"):
        system.many("unrolled")
    with pytest.raises(TypeError, match=r"WarmStart, which stores one adjoint\. Pass adjoint0=hg\.adjoint"):
        system.many(bl.WarmStart("cg"))


def test_gradients_of_numpy_without_the_leading_axis_are_named():
    class Wrong(Distances):
        def grad(self, w, h, t, d):
            return w - t[0], d

    system = System(framework("numpy"))
    with pytest.raises(ValueError, match=r"the outer grad\[0\].*5 rows of params has shape \(5, 6\).*has shape \(6,\)"):
        bl.hypergradients(
            bl.Problem(QUADRATIC.inner, Wrong()),
            *system.at,
            inner_args=system.data,
            outer_args=system.move(system.targets, system.direct),
        )
