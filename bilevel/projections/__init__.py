"""Projections on convex sets for `bilevel.Projected`, in NumPy, torch and JAX.

A bound or a radius is a number, an array, or hyperparameters: all of hparams (None), or the entry of a dict (its key).
"""

from bilevel.projections.affine import affine
from bilevel.projections.box import box, nonnegative
from bilevel.projections.l2_ball import l2_ball
from bilevel.projections.simplex import l1_ball, simplex

__all__ = ["affine", "box", "l1_ball", "l2_ball", "nonnegative", "simplex"]
