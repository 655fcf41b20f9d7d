"""Solvers of linear systems, for all backends."""

from bilevel.linear_solvers.bicgstab import BiCGStab
from bilevel.linear_solvers.cg import CG
from bilevel.linear_solvers.exact import Exact
from bilevel.linear_solvers.gmres import GMRES
from bilevel.linear_solvers.identity import Identity
from bilevel.linear_solvers.linear_solver import STEADY, SYMMETRIC, TRANSPOSED, LinearSolver
from bilevel.linear_solvers.minres import MINRES
from bilevel.linear_solvers.neumann import Neumann
from bilevel.linear_solvers.normal_cg import NormalCG
from bilevel.linear_solvers.nystrom import Nystrom
from bilevel.linear_solvers.prepared import Prepared

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "STEADY",
    "SYMMETRIC",
    "TRANSPOSED",
    "BiCGStab",
    "Exact",
    "Identity",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Prepared",
]
