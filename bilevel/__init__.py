"""Bilevel optimization: hypergradients by implicit differentiation, in NumPy, PyTorch and JAX."""

from bilevel import problems, projections, prox
from bilevel.config import get_backend, get_solver, list_backends, list_preconditioners, list_solvers
from bilevel.diagnosis import diagnose, diagnose_training
from bilevel.errors import DependenceWarning, InnerProblemWarning, SolverError, SolverWarning
from bilevel.hypergradient import hypergradient, hypergradient_from
from bilevel.hypergradients import hypergradients
from bilevel.influence import influence
from bilevel.linear_solvers import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Exact,
    Identity,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
)
from bilevel.linearization import Linearization, NonSymmetric
from bilevel.metagradients import Metagradient, Training, metagradient
from bilevel.methods import Unrolled
from bilevel.micro_batches import MicroBatches
from bilevel.preconditioners import DiagonalPreconditioner, NystromPreconditioner
from bilevel.prepare import extrapolate, prepare
from bilevel.problems.constrained import Constrained
from bilevel.problems.optimality import FixedPoint, Root
from bilevel.problems.problem import Problem
from bilevel.problems.proximal import Projected, Proximal
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.search.constrained_fit import constrained_fit
from bilevel.search.inner_solver import scipy_fit
from bilevel.search.kkt import with_multipliers
from bilevel.search.minimize import minimize
from bilevel.search.newton_fit import newton_fit
from bilevel.search.pareto import pareto
from bilevel.search.proximal_fit import proximal_fit
from bilevel.warm_start import WarmStart

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "Constrained",
    "DependenceWarning",
    "DiagonalPreconditioner",
    "Exact",
    "FixedPoint",
    "Hypergradient",
    "Identity",
    "InnerProblemWarning",
    "LinearSolver",
    "Linearization",
    "Metagradient",
    "MicroBatches",
    "Neumann",
    "NonSymmetric",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "Problem",
    "Projected",
    "Proximal",
    "Root",
    "SolverError",
    "SolverInfo",
    "SolverWarning",
    "Status",
    "Training",
    "Unrolled",
    "WarmStart",
    "constrained_fit",
    "diagnose",
    "diagnose_training",
    "extrapolate",
    "get_backend",
    "get_solver",
    "hypergradient",
    "hypergradient_from",
    "hypergradients",
    "influence",
    "list_backends",
    "list_preconditioners",
    "list_solvers",
    "metagradient",
    "minimize",
    "newton_fit",
    "pareto",
    "prepare",
    "problems",
    "projections",
    "prox",
    "proximal_fit",
    "scipy_fit",
    "with_multipliers",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        return version("bilevel")
    raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
