"""Bilevel optimization: hypergradients by implicit differentiation, in NumPy, PyTorch and JAX."""

from bilevel import problems
from bilevel.config import get_backend, get_solver, list_backends, list_preconditioners, list_solvers
from bilevel.diagnosis import diagnose
from bilevel.equations import FixedPoint, Root
from bilevel.errors import SolverError, SolverWarning
from bilevel.hypergradient import hypergradient, hypergradient_from
from bilevel.minimize import minimize
from bilevel.prepare import extrapolate, prepare
from bilevel.problem import Problem
from bilevel.protocols import Linearization
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.solvers import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    DiagonalPreconditioner,
    Exact,
    Identity,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Unrolled,
)
from bilevel.warm_start import WarmStart

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "DiagonalPreconditioner",
    "Exact",
    "FixedPoint",
    "Hypergradient",
    "Identity",
    "Linearization",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Problem",
    "Root",
    "SolverError",
    "SolverInfo",
    "SolverWarning",
    "Status",
    "Unrolled",
    "WarmStart",
    "diagnose",
    "extrapolate",
    "get_backend",
    "get_solver",
    "hypergradient",
    "hypergradient_from",
    "list_backends",
    "list_preconditioners",
    "list_solvers",
    "minimize",
    "prepare",
    "problems",
]
