"""Methods that turn a linearization into a hypergradient, one file each, each written once for all backends."""

from bilevel.solvers.bicgstab import BiCGStab
from bilevel.solvers.cg import CG
from bilevel.solvers.exact import Exact
from bilevel.solvers.gmres import GMRES
from bilevel.solvers.identity import Identity
from bilevel.solvers.minres import MINRES
from bilevel.solvers.neumann import Neumann
from bilevel.solvers.nystrom import Nystrom
from bilevel.solvers.preconditioners import DiagonalPreconditioner, NystromPreconditioner
from bilevel.solvers.unrolled import Unrolled

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGStab",
    "DiagonalPreconditioner",
    "Exact",
    "Identity",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Unrolled",
]
