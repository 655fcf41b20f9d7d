#!/usr/bin/env bash
# transformers 5.24.0: with gradient accumulation, Trainer takes the sum of the losses of a classifier, and not their mean.
#
# The loss of LlamaForSequenceClassification is the mean over a micro-batch. It accepts the number of items of all
# micro-batches, and does not use it. Trainer takes the loss for normalized, since the model accepts the number. So four
# micro-batches move the weights four times as far as the same examples in one batch.
# Way out: compute_loss_func, with the sum of the losses over num_items_in_batch. Or compare the losses in the log.
# Seen: transformers 5.24.0, torch 2.13.0: 4.00 times as far
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$folder/bin/python" - <<'PYTHON'
import tempfile
import warnings

import torch
import transformers

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
examples = [{"input_ids": [i, i + 1, i + 2], "labels": i % 3} for i in range(8)]


def moved(batch, accumulation):
    """Return how far one step of SGD on the same eight examples moves the weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3, pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
            optim="sgd", learning_rate=0.01, max_grad_norm=0.0, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True, logging_strategy="no",
        )
        transformers.Trainer(model, args, train_dataset=examples).train()
    return float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm())


ratio = moved(2, 4) / moved(8, 1)
print(f"transformers {transformers.__version__}: four micro-batches move the weights {ratio:.2f} times as far")
assert abs(ratio - 4) < 0.01
PYTHON
