"""Hessian-vector products as compiled graphs of operations."""

from bilevel_torch.compiled.backend import Compiled

__all__ = ["Compiled"]
