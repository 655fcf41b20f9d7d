"""`bilevel_torch.trainers.huggingface`: each mistake is named."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from language_models import HELD, TRAIN, arguments, llama, weighted

import bilevel as bl
from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.huggingface import WeightedTrainer


def trained(folder, outer=HELD, **options):
    """Train two steps, each with a step of the weights."""
    given = {"data_weights": DataWeights(3), "outer_dataset": outer, "outer_every": 1} | options
    train = given.pop("train", TRAIN)
    WeightedTrainer(llama(), arguments(folder, max_steps=2), train_dataset=train, **given).train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_weights": 3}, TypeError, r"data_weights: expected DataWeights\(number of sources\), got int"),
        ({"outer": None}, ValueError, "outer_dataset: expected a data set or a list .*, got NoneType"),
        ({"outer": []}, ValueError, "outer_dataset: expected .* one or more examples"),
        ({"outer": iter(HELD)}, ValueError, "outer_dataset: expected .* indexed by their numbers, got list_iterator"),
        ({"outer": {"train": HELD}}, ValueError, "outer_dataset: .*For a DatasetDict, choose a split"),
        ({"outer": [{"input_ids": [1, 2]}]}, ValueError, "outer_dataset: its batches have no 'labels'"),
        ({"outer_batch_size": 0}, ValueError, r"WeightedTrainer\.outer_batch_size: expected an integer >= 1"),
        ({"outer_optimizer": torch.optim.Adam}, TypeError, "optimizer of the hyperparameters: expected .* got Adam"),
        (
            {"outer_optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
            ValueError,
            "optimizer of the hyperparameters does not have all of them",
        ),
        ({"train": [{**e, "source": "wiki"} for e in TRAIN]}, TypeError, "'source': expected integers.*got 'wiki'"),
        ({"train": [{**e, "source": 1.0} for e in TRAIN]}, TypeError, r"'source': expected integers.*got 1\.0"),
        (
            {"train": [{**e, "source": 3} for e in TRAIN]},
            IndexError,
            "expected integers from 0 to 2, got numbers from 3",
        ),
        ({"train": [{"input_ids": [1], "source": 0}] * 4}, ValueError, "training batches have no 'labels'"),
    ],
)
def test_each_mistake_is_named(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trained(tmp_path, **options)


def test_outer_batch_without_labels_is_named(tmp_path):
    with pytest.warns(bl.DependenceWarning, match="outer_dataset: all labels of a batch are -100"):
        trained(tmp_path, outer=[{"input_ids": [1, 2], "labels": [-100, -100]}])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"training batches have no 'source'\. Add this column"):
        weighted(tmp_path, train=HELD).train()
    with pytest.raises(ValueError, match="compute_loss_func: the weights need losses of tokens"):
        WeightedTrainer(llama(), compute_loss_func=print, data_weights=DataWeights(3), outer_dataset=HELD)
    with pytest.raises(ValueError, match="data_weights: a trainer needs a table of weights"):
        WeightedTrainer(llama(), data_weights=DataWeights(torch.nn.Linear(2, 1)), outer_dataset=HELD)
    with pytest.raises(ValueError, match=r"WeightedTrainer\.outer_every: expected an integer >= 1"):
        weighted(tmp_path, every=0)
    trainer = weighted(tmp_path)
    with pytest.raises(ValueError, match=r"returns no logits. Turn off kernels that fuse the loss"):
        trainer.token_losses({"loss": 0}, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with labels of torch\.int64 of the shape \(1, 2, 3\)"):
        trainer.token_losses({"logits": torch.zeros(1, 2, 3, 4)}, torch.zeros(1, 2, 3).long())
    with pytest.raises(ValueError, match=r"labels of torch\.float32 of the shape \(2,\) is neither"):  # a regression
        trainer.token_losses({"logits": torch.zeros(2, 1)}, torch.zeros(2))
