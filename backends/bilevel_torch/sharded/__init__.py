"""Hypergradients of models whose parameters are sharded over processes."""

from bilevel_torch.sharded.backend import Sharded

__all__ = ["Sharded"]
