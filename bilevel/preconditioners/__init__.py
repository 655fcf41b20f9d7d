"""Approximate inverses that make iterative solvers take fewer steps."""

from bilevel.preconditioners.diagonal import DiagonalPreconditioner
from bilevel.preconditioners.function import FunctionPreconditioner
from bilevel.preconditioners.nystrom import NystromPreconditioner
from bilevel.preconditioners.preconditioner import Preconditioner

__all__ = ["DiagonalPreconditioner", "FunctionPreconditioner", "NystromPreconditioner", "Preconditioner"]
