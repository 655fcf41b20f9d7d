"""Small language models with weighted training data. Only for tests that have both torch and transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.huggingface import WeightedTrainer

SCORES = torch.tensor([0.8, -0.5, 0.1])


def llama(vocabulary=20):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def classifier():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 0})
    return transformers.LlamaForSequenceClassification(config)


def text(seed, length, masked=0):
    tokens = torch.randint(20, (length,), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[:masked] = -100
    return {"input_ids": tokens.tolist(), "labels": labels.tolist()}


TRAIN = [{**text(i, 6, masked=i % 3), "source": i % 3} for i in range(12)]
HELD = [text(100 + i, 6) for i in range(5)]


def arguments(folder, **options):
    given = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **(given | options))


def weighted(folder, train=TRAIN, model=None, scores=None, kind=WeightedTrainer, every=2, **options):
    weights = DataWeights(3)
    if scores is not None:
        with torch.no_grad():
            weights.scores.copy_(scores)
    return kind(
        llama() if model is None else model,
        arguments(folder, **options),
        train_dataset=train,
        data_weights=weights,
        outer_dataset=HELD,
        outer_every=every,
    )
