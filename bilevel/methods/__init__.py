"""Methods that turn a problem at a point into a hypergradient."""

from bilevel.methods.unrolled import Unrolled

__all__ = ["Unrolled"]
