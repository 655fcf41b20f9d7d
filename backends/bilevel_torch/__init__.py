"""The PyTorch backend, and functions for use in a training loop."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError(
        'bilevel_torch needs PyTorch, which is not installed: pip install "bilevel[torch]".', name="torch"
    )

from bilevel_torch.backend import TorchBackend
from bilevel_torch.compiled import Compiled
from bilevel_torch.data_parallel import DataParallel
from bilevel_torch.diagnose import diagnose
from bilevel_torch.first_order import FirstOrder
from bilevel_torch.from_losses import backward, hypergradient
from bilevel_torch.implicit import implicit_fixed_point, implicit_minimizer, implicit_root
from bilevel_torch.placement import place_grad
from bilevel_torch.sharded import Sharded
from bilevel_torch.space import TorchSpace
from bilevel_torch.training import TrainingState, TrainingStep, recording, replay

backend = TorchBackend()

__all__ = [
    "Compiled",
    "DataParallel",
    "FirstOrder",
    "Sharded",
    "TorchBackend",
    "TorchSpace",
    "TrainingState",
    "TrainingStep",
    "backend",
    "backward",
    "diagnose",
    "hypergradient",
    "implicit_fixed_point",
    "implicit_minimizer",
    "implicit_root",
    "place_grad",
    "recording",
    "replay",
]
