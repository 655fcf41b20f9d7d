"""Hypergradients by gradients only, for modules that have no second derivative."""

from bilevel_torch.first_order.first_order import FirstOrder

__all__ = ["FirstOrder"]
