"""Learnable weights of training data, a sampler that follows them, and a report."""

from bilevel_torch.data.report import WeightReport
from bilevel_torch.data.sampler import WeightedSampler
from bilevel_torch.data.weights import DataWeights

__all__ = ["DataWeights", "WeightReport", "WeightedSampler"]
