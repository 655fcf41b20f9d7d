"""The library's own solvers and backends run the suites that third parties run."""

import pytest
from frameworks import FRAMEWORKS

import bilevel as bl
from bilevel import linear_solvers
from bilevel.testing import check_backend, check_solver

EVERY_CLASS = ["definite", "ill_conditioned", "indefinite", "singular", "nonsymmetric"]
DEFINITE = ["definite", "ill_conditioned"]
EAGER = ["numpy", "torch"]
SOLVERS = {
    "cg": (bl.CG(), {"solves": [*DEFINITE, "singular"]}),
    "cg_nystrom": (
        bl.CG(preconditioner=bl.NystromPreconditioner(rank=3)),
        {"solves": DEFINITE, "backends": EAGER},
    ),
    "cg_diagonal": (bl.CG(preconditioner=bl.DiagonalPreconditioner()), {"solves": DEFINITE, "backends": EAGER}),
    "minres": (bl.MINRES(), {"solves": [*DEFINITE, "indefinite", "singular"]}),
    "gmres": (bl.GMRES(), {"solves": EVERY_CLASS}),
    "gmres_diagonal": (
        bl.GMRES(preconditioner=bl.DiagonalPreconditioner()),
        {"solves": DEFINITE, "backends": EAGER},
    ),
    "bicgstab_diagonal": (
        bl.BiCGStab(preconditioner=bl.DiagonalPreconditioner()),
        {"solves": DEFINITE, "backends": EAGER},
    ),
    "normal_cg": (bl.NormalCG(), {"solves": EVERY_CLASS}),
    "bicgstab": (bl.BiCGStab(), {"solves": [*DEFINITE, "indefinite", "nonsymmetric"]}),
    "nystrom": (
        bl.Nystrom(),
        {"truncated": True, "warm_start": False, "excused": {"many_unknowns": "rank 20 is no model of 40 unknowns"}},
    ),
    "exact": (bl.Exact(), {"solves": EVERY_CLASS, "warm_start": False}),
    "neumann": (bl.Neumann(terms=200), {"solves": ["definite", "singular"], "truncated": True}),
    "neumann_rtol": (
        bl.Neumann(terms=200, rtol=1e-6),
        {
            "solves": ["definite", "singular"],
            "backends": EAGER,
            "excused": {"stochastic": "a tolerance needs one system, whose residual can be measured"},
        },
    ),
    "neumann_short": (bl.Neumann(step_size=0.25), {"solves": [], "truncated": True, "backends": EAGER}),
    "identity": (bl.Identity(), {"solves": [], "truncated": True, "warm_start": False}),
    "unrolled": (bl.Unrolled(steps=200), {"truncated": True}),
    "unrolled_forward": (bl.Unrolled(steps=200, mode="forward"), {"truncated": True, "backends": EAGER}),
    "unrolled_momentum": (
        bl.Unrolled(steps=300, step_size=0.2, momentum=0.3),
        {"truncated": True, "backends": EAGER},
    ),
}
# JAX compiles anew for each of these, and they depend on the solver more than on the framework: there, for cg alone.
SLOW_IN_JAX = tuple(f"{law}-jax" for law in ("maxiter", "damping", "drift", "prepared", "in_a_hypergradient"))
ANALYTIC = "objectives bring their own derivatives"
EXCUSED = {"numpy": {"inner_cut_off": ANALYTIC, "outer_cut_off": ANALYTIC}}


def installed(names):
    return [name for name in names if name in bl.list_backends()]


SOLVER_CHECKS = [
    pytest.param(check, id=f"{name}-{check}")
    for name, (solver, promises) in SOLVERS.items()
    for check in check_solver(solver, **{**promises, "backends": installed(promises.get("backends", FRAMEWORKS))})
    if name == "cg" or check.name not in SLOW_IN_JAX
]
BACKEND_CHECKS = [check for name in installed(FRAMEWORKS) for check in check_backend(name, excused=EXCUSED.get(name))]


@pytest.mark.parametrize("check", SOLVER_CHECKS)
def test_solvers(check):
    check()


@pytest.mark.parametrize("check", BACKEND_CHECKS, ids=str)
def test_backends(check):
    check()


def test_no_solver_is_missing():
    classes = [getattr(linear_solvers, name) for name in linear_solvers.__all__]
    solvers = {c for c in classes if isinstance(c, type)} - {bl.LinearSolver, linear_solvers.Prepared}
    assert {type(solver) for solver, _ in SOLVERS.values()} == {*solvers, bl.Unrolled}
