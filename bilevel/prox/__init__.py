"""Proximal operators for `bilevel.Proximal`, in NumPy, torch and JAX.

A penalty is the exponential of hyperparameters: all of hparams (None), or the entry of a dict (its key). A number or an
array in its place is a constant penalty, without the exponential.
"""

from bilevel.prox.group_lasso import group_lasso
from bilevel.prox.l1 import elastic_net, l1
from bilevel.prox.nuclear_norm import nuclear_norm
from bilevel.prox.separable import separable
from bilevel.prox.total_variation import total_variation

__all__ = ["elastic_net", "group_lasso", "l1", "nuclear_norm", "separable", "total_variation"]
