"""The PyTorch backend."""

from bilevel_torch.backend import TorchBackend
from bilevel_torch.space import TorchSpace

backend = TorchBackend()

__all__ = ["TorchBackend", "TorchSpace", "backend"]
