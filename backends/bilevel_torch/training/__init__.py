"""Training steps of torch modules and optimizers, for derivatives of training runs."""

from bilevel_torch.training.recording import recording
from bilevel_torch.training.replay import replay
from bilevel_torch.training.state import TrainingState
from bilevel_torch.training.step import TrainingStep

__all__ = ["TrainingState", "TrainingStep", "recording", "replay"]
