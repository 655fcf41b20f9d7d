"""A callback of Lightning that tunes hyperparameters while a module trains."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("lightning") is None:
    raise ModuleNotFoundError(
        "bilevel_torch.trainers.lightning needs Lightning, which is not installed: pip install lightning.",
        name="lightning",
    )

import lightning as L

from bilevel.options import check_int
from bilevel_torch.trainers.outer_step import OuterStep, ids, parameters

LossOfBatch = Callable[[Any, Any], torch.Tensor]  # from the module and a batch

__all__ = ["HypergradientCallback"]


class HypergradientCallback(L.Callback):
    """Tune hyperparameters of a LightningModule by `bilevel_torch.FirstOrder`, every few training steps.

    The module trains as usual, by automatic optimization with one optimizer. After a step, the callback computes the
    inner loss on the same batches, the outer loss on a batch of other data, and a step of the hyperparameters. With
    ``accumulate_grad_batches``, it uses all micro-batches of the training step. An Adam that trains the module is also
    the preconditioner. Lightning's checkpoints hold the state of the callback. The callback logs the outer loss.

    Args:
        hparams: the tensors to tune, such as ``module.weights.parameters()``. They may belong to the module. Then leave
            them out of ``configure_optimizers``.
        inner: a function of the module and a training batch that returns the training loss, computed with hparams. It
            must not call ``log``. For example, ``Module.train_loss``.
        outer: the same for the outer loss and a batch of ``batches``.
        batches: a loader of validation data. It is read again and again. If it shuffles, give it a ``generator``, so
            that a resumed run has the same batches.
        optimizer: the optimizer of hparams. None: Adam with a learning rate of 0.1.
        every: the number of training steps between two steps of hparams.

    Raises:
        TypeError, ValueError: for invalid arguments, or a module with manual optimization or several optimizers.
    """

    def __init__(
        self,
        hparams: Iterable[torch.Tensor],
        inner: LossOfBatch,
        outer: LossOfBatch,
        batches: Iterable[Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        every: int = 10,
    ) -> None:
        self.every = every
        check_int(self, "every", least=1)
        tensors = [hparams] if isinstance(hparams, torch.Tensor) else list(hparams)
        if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise ValueError("hparams: expected one or more tensors, such as weights.parameters().")
        for name, function in {"inner": inner, "outer": outer}.items():
            if not callable(function):
                raise TypeError(
                    f"{name}: expected a function of the module and a batch, got {type(function).__name__}. For "
                    "example, pass Module.train_loss."
                )
        self._inner, self._outer = inner, outer
        self._hparams = tensors
        self._step = OuterStep(tensors, optimizer or torch.optim.Adam(tensors, 0.1), batches, every)
        self._micro_batches: list[Any] = []
        self._steps = 0  # of training, when the micro-batches began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError(
                "HypergradientCallback needs automatic optimization with one optimizer. With manual optimization, call "
                "bilevel_torch.FirstOrder in training_step."
            )
        if trainer.world_size > 1:
            raise ValueError(
                "HypergradientCallback supports one process. For several, call bilevel_torch.FirstOrder in "
                "training_step, and average the .grad of the hyperparameters."
            )
        if ids(self._hparams) & ids(parameters(trainer.optimizers[0])):
            raise ValueError(
                "configure_optimizers: the optimizer of the module also moves hyperparameters, along the gradient of "
                "the training loss. Leave them out, for example by torch.optim.AdamW(self.net.parameters())."
            )
        self._micro_batches, self._steps = [], trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step of the hyperparameters if a training step has ended and it is time."""
        if outputs:  # else training_step has skipped this batch
            self._micro_batches.append(batch)
        if trainer.global_step == self._steps:
            return
        micro_batches, self._micro_batches, self._steps = self._micro_batches, [], trainer.global_step
        if not micro_batches or not self._step.due(self._steps):
            return

        def loss(function: LossOfBatch, batch: Any) -> torch.Tensor:
            with trainer.precision_plugin.train_step_context():
                return function(pl_module, batch)

        def outer(batch: Any) -> torch.Tensor:
            return loss(self._outer, trainer.strategy.batch_to_device(batch))

        inner = [partial(loss, self._inner, part) for part in micro_batches]
        hg = self._step(pl_module, trainer.optimizers[0], inner, outer)
        pl_module.log("outer_loss", hg.value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for Lightning's checkpoints."""
        return self._step.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._step.load_state_dict(state_dict)
