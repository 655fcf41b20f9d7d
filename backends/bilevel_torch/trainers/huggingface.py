"""Trainers of transformers that learn weights of their training data."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "bilevel_torch.trainers.huggingface needs transformers, which is not installed: "
        'pip install "transformers[torch]".',
        name="transformers",
    )

import transformers
from torch.utils.data import DataLoader
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from bilevel.errors import DependenceWarning
from bilevel.messages import callers_level
from bilevel.options import check_int
from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.collator import KeepColumn
from bilevel_torch.trainers.outer_step import OuterStep

STATE = "bilevel.pt"  # in the folder of a checkpoint
LOGGED = 32  # weights: more would fill the log
MASKED = -100  # the label of a token without a loss

__all__ = ["DataWeightsMixin", "WeightedTrainer"]

_Base = transformers.Trainer if TYPE_CHECKING else object


class DataWeightsMixin(_Base):
    """Weight the training losses of a `transformers.Trainer`, and learn the weights by `bilevel_torch.FirstOrder`.

    Put it before a trainer: ``class WeightedSFTTrainer(DataWeightsMixin, SFTTrainer): pass``. A TrainerCallback would
    not do, since it has neither the training batches nor the loss. The training loss is

        L = Σ w ℓ / number of labels

    over the tokens of all micro-batches of a step, where w is the weight of the example or token. Labels of -100 do not
    count. With all weights 1, it is the trainer's loss of a language model. (Under gradient accumulation, the trainer
    itself takes a sum over the micro-batches for some classifiers. Here it is the mean over all examples.) Every
    ``outer_every`` steps, the unweighted loss of a batch of ``outer_dataset`` is the outer loss. An Adam that trains
    the model is also the preconditioner. A ``label_smoothing_factor`` smooths both losses.

    Evaluation is unweighted. The trainer logs the outer loss and up to 32 weights. Its checkpoints have the state of
    the mixin in the file ``bilevel.pt``, so ``train(resume_from_checkpoint=...)`` continues to the same weights.

    Args:
        args, kwargs: the arguments of the trainer.
        data_weights: the weights. They move to the device of the model.
        weighted_by: a column of the training data. It has an integer for each example, such as the number of its
            source. For packed examples, it has a list of integers, one for each token.
        outer_dataset: clean data of the wanted kind, with the columns of the evaluation data. A data set with a length.
        outer_every: the number of optimizer steps between two steps of the weights.
        outer_batch_size: examples of an outer batch. None: ``args.per_device_train_batch_size``.
        outer_optimizer: the optimizer of the weights. None: Adam with a learning rate of 0.1.

    Raises:
        TypeError, ValueError: for invalid arguments, several processes, or a model without logits.
    """

    def __init__(
        self,
        *args: Any,
        data_weights: DataWeights,
        outer_dataset: Any,
        weighted_by: str = "source",
        outer_every: int = 10,
        outer_batch_size: int | None = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the weights need losses of tokens. Override token_losses instead.")
        if not isinstance(data_weights, DataWeights):
            raise TypeError(
                f"data_weights: expected DataWeights(number of sources), got {type(data_weights).__name__}."
            )
        if isinstance(data_weights.scores, torch.nn.Module):
            raise ValueError("data_weights: a trainer needs a table of weights. Pass DataWeights(number of sources).")
        _check_outer_dataset(outer_dataset)
        self.outer_every, self.outer_batch_size = outer_every, outer_batch_size
        check_int(self, "outer_every", least=1)
        if outer_batch_size is not None:
            check_int(self, "outer_batch_size", least=1)
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                "DataWeightsMixin supports one process and one device. For several, call bilevel_torch.FirstOrder in "
                "your loop, and average the .grad of the weights."
            )
        self.data_weights, self.weighted_by = data_weights.to(self.args.device), weighted_by
        self.compute_loss_func = self._loss_of_outputs
        self._items: torch.Tensor | None = None  # of the batch in compute_loss
        self._micro_batches: list[tuple[Any, Any]] = []
        self._outer_loss: float | None = None
        self.data_collator = KeepColumn(self.data_collator, weighted_by)
        hparams = list(data_weights.parameters())
        outer_batches = DataLoader(
            outer_dataset,
            outer_batch_size or self.args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        optimizer = outer_optimizer or torch.optim.Adam(hparams, 0.1)
        self._outer_step = OuterStep(hparams, optimizer, outer_batches, outer_every)
        self.add_callback(_Hooks(self))

    def token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each label, in the shape of the labels, and 0 where a label is -100.

        This method is for causal language models, with labels of shape (batch, tokens), and for classifiers, with
        labels of shape (batch,). Override it for other losses.

        Args:
            outputs: the outputs of the model, with ``logits``.
            labels: the labels of the batch.

        Raises:
            ValueError: for other models, or without logits.
        """
        logits = outputs.get("logits")
        if logits is None:
            raise ValueError("The model returns no logits. Turn off kernels that fuse the loss, such as Liger's.")
        options: Any = {"ignore_index": MASKED, "label_smoothing": self.args.label_smoothing_factor}
        integers = not labels.is_floating_point()  # else a regression
        if integers and labels.ndim == 1 and logits.ndim == 2:
            return cross_entropy(logits.float(), labels, reduction="none", **options)
        if not integers or labels.ndim != 2 or logits.ndim != 3 or not _is_causal(self.model):
            raise ValueError(
                f"token_losses: {type(self.model).__name__} with labels of {labels.dtype} of the shape "
                f"{tuple(labels.shape)} is neither a causal language model nor a classifier. Override token_losses."
            )
        losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", **options)
        return torch.nn.functional.pad(losses, (1, 0))  # nothing predicts the first token

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, perhaps from a checkpoint of a weighted run."""
        self._micro_batches = []
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            self._load_weights(get_last_checkpoint(str(self.args.output_dir)) if folder is True else str(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take a training step. Keep the batch if a step of the weights follows."""
        if self.weighted_by not in inputs:
            raise ValueError(
                f"The training batches have no {self.weighted_by!r}. Add this column to train_dataset. SFTTrainer's "
                "packing drops it: pack with trl.pack_dataset first, with a list of integers for each text."
            )
        if "labels" not in inputs:
            raise ValueError("The training batches have no 'labels'. Add this column to train_dataset, or a collator.")
        if self._outer_step.due(self.state.global_step + 1):
            self._micro_batches.append((dict(inputs), num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of the trainer, weighted in training."""
        inputs = dict(inputs)
        items = inputs.pop(self.weighted_by, None)
        self._items = items if model.training else None
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._items = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the outer loss and the weights with the training loss."""
        if "loss" in logs and self._outer_loss is not None:
            logs["outer_loss"] = self._outer_loss
            weights = self.data_weights().tolist()
            logs |= {f"weight_{i}": w for i, w in enumerate(weights) if len(weights) <= LOGGED}
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.weighted_by not in columns:
            columns.append(self.weighted_by)

    def _loss_of_outputs(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a batch. The trainer calls this."""
        losses = self.token_losses(outputs, labels)
        if self._items is not None:
            w = self.data_weights(self._items)
            losses = losses * (w if w.shape == losses.shape else w.reshape(-1, *[1] * (losses.ndim - 1)))
        if num_items_in_batch is None:
            counted = labels[:, 1:] if labels.ndim == 2 else labels
            num_items_in_batch = (counted != MASKED).sum().clamp(min=1)
        return losses.sum() / num_items_in_batch

    def _loss(self, inputs: Any, weighted: bool, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a batch, without the other measurements of a trainer."""
        inputs = dict(self._prepare_inputs(dict(inputs)))
        items, labels = inputs.pop(self.weighted_by, None), inputs.pop("labels", None)
        if not weighted:
            _check_outer_labels(labels)
        model: Any = self.model_wrapped
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
            self._items = items if weighted else None
            try:
                return self._loss_of_outputs(outputs, labels, num_items_in_batch)
            finally:
                self._items = None

    def _step_of_weights(self) -> None:
        """Take a step of the weights if it is time."""
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches or not self._outer_step.due(self.state.global_step):
            return
        # FirstOrder takes the mean of the losses, and these are parts of a sum.
        inner = [lambda b=b, n=n: len(micro_batches) * self._loss(b, True, n) for b, n in micro_batches]
        model: Any = self.model
        trained_by: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        hg = self._outer_step(model, trained_by, inner, lambda batch: self._loss(batch, False))
        self._outer_loss = float(hg.value)

    def _save_weights(self) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        state = {"weights": self.data_weights.state_dict(), "outer_step": self._outer_step.state_dict()}
        torch.save(state, folder / STATE)

    def _load_weights(self, folder: str | None) -> None:
        path = Path(folder or "") / STATE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {STATE}, so it does not come from a run with weights. Load "
                "its model by from_pretrained, and start a new run."
            )
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.data_weights.load_state_dict(state["weights"])
        self._outer_step.load_state_dict(state["outer_step"])


class WeightedTrainer(DataWeightsMixin, transformers.Trainer):
    """`transformers.Trainer` with `DataWeightsMixin`."""


class _Hooks(transformers.TrainerCallback):
    """Call the mixin after steps and checkpoints."""

    def __init__(self, trainer: DataWeightsMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take a step of the weights."""
        self._trainer._step_of_weights()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Add the state to the checkpoint."""
        self._trainer._save_weights()


def _check_outer_dataset(data: Any) -> None:
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, dict)
    if not indexed or not len(data):
        raise ValueError(
            "outer_dataset: expected a data set or a list of one or more examples, indexed by their numbers, got "
            f"{type(data).__name__}. For a DatasetDict, choose a split."
        )


def _check_outer_labels(labels: torch.Tensor | None) -> None:
    if labels is None:
        raise ValueError("outer_dataset: its batches have no 'labels'. Add this column.")
    if bool((labels == MASKED).all()):
        warnings.warn(
            f"outer_dataset: all labels of a batch are {MASKED}, so its outer loss is 0. Remove examples without "
            "labels, which may also be texts that were cut.",
            DependenceWarning,
            stacklevel=callers_level(),
        )


def _is_causal(model: Any) -> bool:
    """Tell whether a model is a causal language model. Its logits predict the next label."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
