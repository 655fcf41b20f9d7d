"""Approximate inverses that make conjugate gradients take fewer steps."""

from bilevel.preconditioners.preconditioners import DiagonalPreconditioner, NystromPreconditioner

__all__ = ["DiagonalPreconditioner", "NystromPreconditioner"]
