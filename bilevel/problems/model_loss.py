"""An inner objective with a separate model and loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelLoss:
    """L = loss(model(w, λ, x), *targets) + penalty(w, λ), from `bilevel.Problem.from_model`."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    penalty: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        signatures = {"model": "(params, hparams, x)", "loss": "(output, *targets)", "penalty": "(params, hparams)"}
        for role, signature in signatures.items():
            function = getattr(self, role)
            if not (callable(function) or (role == "penalty" and function is None)):
                raise TypeError(f"{role}: expected a function of {signature}, got {type(function).__name__}.")

    def split(self, x: object, *targets: object) -> tuple[object, tuple[object, ...]]:
        """Return the arguments of the model and of the loss."""
        return x, targets

    def __call__(self, params: object, hparams: object, x: object, *targets: object) -> Any:
        value = self.loss(self.model(params, hparams, x), *targets)
        return value if self.penalty is None else value + self.penalty(params, hparams)
