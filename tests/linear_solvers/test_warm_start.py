"""`bl.WarmStart`: a solver with a memory, in every eager framework."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from frameworks import framework, relative_error, symmetric

import bilevel as bl
from bilevel.linearization import Linearization

EAGER = ["numpy", "torch"]
H = symmetric(np.geomspace(0.1, 10, 30))
RHS = np.random.default_rng(1).standard_normal((6, 30))
SPECS = [
    "cg",
    {"name": "neumann", "terms": 5},
    {"name": "nystrom", "rank": 30, "damping": 0.1},
    {"name": "cg", "preconditioner": {"name": "nystrom", "rank": 4}},
    {"name": "cg", "preconditioner": "diagonal"},
]


def run(name, solver, first=0, last=6, **options):
    """Solve systems that move a little from call to call; return adjoints and steps."""
    backend = framework(name)
    matrix, found = backend.from_numpy(H), []
    for t in range(first, last):
        rhs = backend.from_numpy(RHS[0] + 0.01 * t * RHS[1])
        lin = Linearization(rhs[0], rhs, None, lambda v: matrix @ v, lambda v: v)
        found.append(bl.hypergradient_from(lin, solver=solver, **options))
    return [backend.to_numpy(hg.adjoint) for hg in found], [hg.info.steps for hg in found]


@pytest.mark.parametrize("name", EAGER)
def test_each_solve_starts_from_the_last_solution(name):
    cold, cold_steps = run(name, "cg")
    warm, warm_steps = run(name, bl.WarmStart("cg"))
    _, straight_steps = run(name, bl.WarmStart("cg", extrapolate=True))
    assert warm_steps[0] == cold_steps[0]
    assert sum(straight_steps[2:]) < sum(warm_steps[2:]) < sum(cold_steps[2:])
    for a, b in zip(cold, warm, strict=True):
        assert relative_error(a, b) <= 1e-3


@pytest.mark.parametrize("name", EAGER)
def test_a_start_that_is_given_takes_precedence(name):
    solver, backend = bl.WarmStart("cg"), framework(name)
    run(name, solver, 0, 1)
    exact = backend.from_numpy(np.linalg.solve(H, RHS[0]))
    assert run(name, solver, 0, 1, adjoint0=exact)[1] == [0]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize(
    "spec", [{"name": "neumann", "terms": 5}, {"name": "cg", "preconditioner": {"name": "nystrom", "rank": 4}}], ids=str
)
def test_what_is_prepared_serves_so_many_calls(name, spec):
    products = []

    def count(solver, calls):
        backend = framework(name)
        matrix, rhs = backend.from_numpy(H), backend.from_numpy(RHS[0])
        products.clear()
        for _ in range(calls):
            lin = Linearization(rhs[0], rhs, None, lambda v: products.append(1) or matrix @ v, lambda v: v)
            bl.hypergradient_from(lin, solver=solver)
        return len(products)

    preparing = 12 if spec["name"] == "neumann" else 4
    each = count(bl.WarmStart(spec), 6)
    assert each - count(bl.WarmStart(spec, prepare_every=3), 6) == 4 * preparing


@pytest.mark.parametrize("name", EAGER)
def test_a_solve_that_is_not_finite_is_forgotten(name):
    solver, backend = bl.WarmStart("cg", extrapolate=True), framework(name)
    run(name, solver, 0, 2)
    rhs = backend.from_numpy(RHS[0] * np.nan)
    bl.hypergradient_from(
        Linearization(rhs[0], rhs, None, lambda v: v, lambda v: v), solver=solver, on_failure="ignore"
    )
    assert np.isfinite(backend.to_numpy(solver.adjoint)).all()
    with pytest.raises(bl.SolverError):
        bl.hypergradient_from(Linearization(rhs[0], rhs, None, lambda v: v, lambda v: v), solver=bl.WarmStart())
    assert run(name, solver, 2, 3)[1][0] < run(name, "cg", 2, 3)[1][0]


@pytest.mark.parametrize("name", EAGER)
def test_what_an_indefinite_system_leaves_is_not_built_upon(name):
    """As in a training loop whose batches have Hessians that are not positive definite, each in its own way."""
    solver, backend = bl.WarmStart(bl.CG(rtol=1e-2, damping=0.0), extrapolate=True), framework(name)
    rhs, norms = backend.from_numpy(RHS[0]), []
    for seed in range(60):
        matrix = backend.from_numpy(symmetric(np.linspace(-0.5, 2, 30), seed))
        lin = Linearization(rhs[0], rhs, None, lambda v, matrix=matrix: matrix @ v, lambda v: v)
        hg = bl.hypergradient_from(lin, solver=solver, on_failure="ignore")
        assert hg.info.status is bl.Status.NEGATIVE_CURVATURE
        norms.append(np.linalg.norm(backend.to_numpy(solver.adjoint)))
    assert max(norms[30:]) <= 2 * max(norms[:30])


class Bounds(NamedTuple):
    """What a solver of one's own finds out."""

    largest: Any
    name: str


@dataclass(frozen=True)
class Bounded(bl.LinearSolver):
    """v = b over a largest eigenvalue."""

    def init(self, A):
        ones = A.space.map(lambda a: a * 0 + 1, A.space.zeros())
        return Bounds(A.space.max_abs(A(ones)), "by one product")

    def solve(self, state, A, b, x0):
        return bl.Identity(1 / state.largest).solve(None, A, b, x0)


class TestState:
    @pytest.mark.parametrize("name", EAGER)
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_a_run_that_resumes_is_the_run_that_went_on(self, name, spec, tmp_path):
        def new():
            return bl.WarmStart(spec, extrapolate=True, prepare_every=4)

        whole, _ = run(name, new())
        first = new()
        run(name, first, 0, 3)
        resumed = new()
        resumed.load_state_dict(self.stored(name, first.state_dict(), tmp_path))
        rest, _ = run(name, resumed, 3, 6)
        for a, b in zip(whole[3:], rest, strict=True):
            np.testing.assert_array_equal(a, b)

    @staticmethod
    def stored(name, state, folder):
        if name == "numpy":
            return deepcopy(state)
        torch = pytest.importorskip("torch")
        torch.save(state, folder / "state.pt")
        return torch.load(folder / "state.pt", weights_only=True)

    def test_a_state_of_another_layout_is_brought_into_that_of_params(self):
        """A dtype stands for what needs a second device: Accelerate and Lightning load to the CPU, for one."""
        torch = pytest.importorskip("torch")
        solver, rhs = bl.WarmStart("cg", extrapolate=True), torch.ones(2)
        stored = torch.full((2,), 0.5, dtype=torch.float64)
        solver.load_state_dict({**solver.state_dict(), "adjoint": stored, "previous": stored})
        lin = Linearization(rhs[0], rhs, None, lambda v: 2 * v, lambda v: v)
        hg = bl.hypergradient_from(lin, solver=solver)
        assert hg.info.steps == 0
        assert hg.adjoint.dtype is solver.state_dict()["previous"].dtype is torch.float32

    @pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "cg"], ids=str)
    def test_what_was_prepared_is_brought_into_it_too(self, spec):
        torch = pytest.importorskip("torch")
        solver, matrix, rhs = bl.WarmStart(spec, prepare_every=4), torch.as_tensor(H), torch.as_tensor(RHS[0])

        def solve(solver, dtype):
            A, b = matrix.to(dtype), rhs.to(dtype)
            lin = Linearization(b[0], b, None, lambda v: A @ v, lambda v: v)
            return bl.hypergradient_from(lin, solver=solver, on_failure="ignore").adjoint

        solve(solver, torch.float64)
        state = solver.state_dict()
        resumed = bl.WarmStart(spec, prepare_every=4)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # before it is of use, too
        found = solve(resumed, torch.float32)
        assert found.dtype is torch.float32
        assert relative_error(found.double(), solve(solver, torch.float64)) <= 1e-3

    @pytest.mark.parametrize("spec", [*SPECS[2:], "own"], ids=str)
    def test_what_was_prepared_has_any_structure(self, spec, tmp_path):
        torch = pytest.importorskip("torch")
        rhs = {"b": [torch.as_tensor(RHS[0, :12]).reshape(3, 4), (torch.as_tensor(RHS[0, 12:]),)], "a": torch.ones(2)}
        diagonal = torch.linspace(1, 3, 32, dtype=torch.float64)
        space = framework("torch").space(rhs)

        def solve(solver):
            lin = Linearization(rhs["a"][0], rhs, None, lambda v: space.unravel(diagonal * space.ravel(v)), lambda v: v)
            hg = bl.hypergradient_from(lin, solver=solver, on_failure="ignore")
            return space.ravel(hg.adjoint)

        first, resumed = (bl.WarmStart(Bounded() if spec == "own" else spec, prepare_every=4) for _ in range(2))
        solve(first)
        resumed.load_state_dict(self.stored("torch", first.state_dict(), tmp_path))
        assert torch.equal(solve(resumed), solve(first))
        assert str(resumed.state) == str(first.state)

    def test_a_new_one_has_a_state_too(self):
        solver = bl.WarmStart("neumann")
        solver.load_state_dict(bl.WarmStart("neumann").state_dict())
        assert solver.calls == 0

    def test_another_solver_takes_over_the_adjoint_and_prepares_anew(self):
        first = bl.WarmStart({"name": "neumann", "terms": 300}, prepare_every=4)
        run("numpy", first, 0, 2)
        other = bl.WarmStart("cg", prepare_every=4)
        other.load_state_dict(first.state_dict())
        assert other.state is None
        assert run("numpy", other, 2, 3)[1][0] < run("numpy", "cg", 2, 3)[1][0]

    @pytest.mark.filterwarnings("ignore:torch.distributed is")
    def test_torch_distributed_saves_an_automatic_damping(self, tmp_path):
        """As docs/distributed.md writes it."""
        torch = pytest.importorskip("torch")
        import torch.distributed.checkpoint as dcp

        matrix, rhs = torch.diag(torch.tensor([-0.1, 0.5, 1.0, 2.0])), torch.ones(4)

        def solve(solver):
            lin = Linearization(rhs[0], rhs, None, lambda v: matrix @ v, lambda v: v)
            return bl.hypergradient_from(lin, solver=solver).info

        first, resumed = bl.WarmStart("cg"), bl.WarmStart("cg")
        found = solve(first).damping
        template = {"adjoint": torch.zeros(4), "image": torch.zeros(4)}
        template |= {"damping": torch.zeros(()), "residual_norm": torch.zeros(())}
        state = {"solver": resumed.state_dict() | template}
        dcp.save({"solver": first.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        resumed.load_state_dict(state["solver"])
        assert solve(resumed) == solve(first)
        assert solve(resumed).damping < found

    def test_another_state_is_refused(self):
        solver = bl.WarmStart()
        with pytest.raises(
            ValueError, match=r"expected the keys \['adjoint', .*got \['adjoint'\].*not a state of a WarmStart"
        ):
            solver.load_state_dict({"adjoint": None})
        with pytest.raises(ValueError, match=r"expected format 4, got 1"):
            solver.load_state_dict({**solver.state_dict(), "format": 1})


class TestErrors:
    def test_a_warm_start_in_another_one_or_in_prepare(self):
        with pytest.raises(TypeError, match=r"WarmStart: the solver is a WarmStart\. Use it directly"):
            bl.WarmStart(bl.WarmStart("cg"))
        problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.ones(2))
        with pytest.raises(TypeError, match=r"bl\.prepare: the solver is a WarmStart, .* prepare_every="):
            bl.prepare(bl.WarmStart("neumann"), problem, np.zeros(2), np.zeros(2))

    def test_unrolled_solves_no_linear_system(self):
        with pytest.raises(TypeError, match=r"WarmStart needs a linear solver.*Unrolled runs inner steps"):
            bl.WarmStart("unrolled")

    def test_prepare_every_is_a_number_of_calls(self):
        with pytest.raises(ValueError, match=r"WarmStart\.prepare_every: expected an integer >= 1, got 0"):
            bl.WarmStart(prepare_every=0)

    def test_params_of_another_size(self):
        solver = bl.WarmStart()
        run("numpy", solver, 0, 1)
        lin = Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: v)
        with pytest.raises(ValueError, match=r"stored adjoint has another structure.*reset\(\)"):
            bl.hypergradient_from(lin, solver=solver)
        solver.reset()
        assert bl.hypergradient_from(lin, solver=solver).info.status is bl.Status.CONVERGED

    def test_it_prints_what_it_is(self):
        assert (
            str(bl.WarmStart(bl.Identity())) == "WarmStart(Identity(scale=1.0), extrapolate=False, prepare_every=None)"
        )

    def test_its_options_are_not_changed_from_outside(self):
        with pytest.raises(TypeError, match="options of a WarmStart cannot be changed"):
            bl.get_solver(bl.WarmStart(), maxiter=3)

    def test_a_failure_names_the_solver_in_it(self):
        lin = Linearization(0.0, np.ones(30), None, lambda v: H @ v, lambda v: v)
        with pytest.warns(bl.SolverWarning, match="CG: stopped after 2 steps"):
            bl.hypergradient_from(lin, solver=bl.WarmStart(bl.CG(maxiter=2)))

    def test_what_the_solver_refuses_is_refused(self):
        problem = bl.problems.ridge()
        X, y, w, h = np.eye(3), np.ones(3), np.full(3, 0.5), np.zeros(3)
        with pytest.raises(TypeError, match=r"batch per product, but .* needs the same Hessian"):
            bl.hypergradient(problem, w, h, inner_args=[(X, y), (X, y)], outer_args=(X, y), solver=bl.WarmStart("cg"))


def test_diagnose_leaves_the_memory_alone():
    problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    solver = bl.WarmStart("cg")
    report = bl.diagnose(problem, np.array([1.0, 0.25]), np.ones(2), solver=solver)
    assert report.ok
    assert solver.calls == 0
    assert solver.adjoint is None
