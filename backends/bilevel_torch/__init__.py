"""The PyTorch backend, and the entries for a training loop of one's own."""

from bilevel_torch.backend import TorchBackend
from bilevel_torch.data_parallel import DataParallel
from bilevel_torch.from_losses import backward, hypergradient
from bilevel_torch.implicit import implicit_minimizer
from bilevel_torch.space import TorchSpace

backend = TorchBackend()

__all__ = ["DataParallel", "TorchBackend", "TorchSpace", "backend", "backward", "hypergradient", "implicit_minimizer"]
