"""Metagradients: derivatives of a whole training run, with checkpoints in memory, on the host or on disk."""

from bilevel.metagradients.metagradient import metagradient
from bilevel.metagradients.results import Metagradient, MetagradientInfo
from bilevel.metagradients.training import Training

__all__ = ["Metagradient", "MetagradientInfo", "Training", "metagradient"]
