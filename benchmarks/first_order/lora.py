"""Fine-tune a GPT-2 by LoRA in transformers' Trainer, on sources half of which have shuffled words.

The network has about a million weights and a configuration of GPT-2. It first trains on every second sequence of the
text of `sources`, not shuffled. Then LoRA on all linear layers of its blocks trains on the others, in eight sources.
"uniform" and "clean" are the plain Trainer, on all sources and on the clean half. "weighted" is `WeightedTrainer`.
Printed for each run: the AUC of the weights, the test loss before and after, CPU seconds, and the peak memory of all
tensors in a short run.

    OMP_NUM_THREADS=1 python -m benchmarks.first_order.lora --data DIR [--seeds 5]
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no name of a model is looked up

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

from benchmarks.first_order import sources
from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.huggingface import WeightedTrainer

METHODS = ["uniform", "clean", "weighted"]
SIZE = sources.Size(steps=150, every=4, rate=0.2)
Arrays = dict[str, np.ndarray]  # which travel to another process by value


def network(size: sources.Size) -> Any:
    """Return a GPT-2 without dropout."""
    config = transformers.GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.words + 1,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config)


def examples(sequences: Tensor, source: Tensor | None = None) -> list[dict[str, Any]]:
    """Return sequences as examples of a Trainer."""
    found: list[dict[str, Any]] = [{"input_ids": row, "labels": row} for row in sequences]
    return found if source is None else [e | {"source": int(s)} for e, s in zip(found, source, strict=True)]


def arguments(folder: str, size: sources.Size, seed: int) -> transformers.TrainingArguments:
    """Return the arguments of both trainers."""
    return transformers.TrainingArguments(
        folder,
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        learning_rate=3e-3,
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


@torch.no_grad()
def mean_loss(model: Any, sequences: Tensor) -> float:
    """Return the mean loss of sequences of one length."""
    return float(np.mean([float(model(input_ids=part, labels=part).loss) for part in sequences.split(64)]))


def pretrain(folder: Path | None, size: sources.Size, seed: int) -> Arrays:
    """Return the weights after a training on one half of the text, before the shuffling."""
    quiet()
    torch.manual_seed(seed)
    model, text = network(size), sources.read(folder, size, seed)
    with tempfile.TemporaryDirectory() as output:
        transformers.Trainer(model, arguments(output, size, seed), train_dataset=examples(text.before[::2])).train()
    return {name: t.numpy() for name, t in model.state_dict().items()}


def trainer_of(method: str, text: sources.Text, size: sources.Size, seed: int, pretrained: Arrays, folder: str) -> Any:
    """Return the trainer of a method. Its model has LoRA on all linear layers of its blocks."""
    torch.manual_seed(seed)
    base = network(size)
    base.load_state_dict({name: torch.tensor(values) for name, values in pretrained.items()})
    layers = ["c_attn", "c_proj", "c_fc"]
    model: Any = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True)
    )
    args, later = arguments(folder, size, seed), torch.arange(1, len(text.train), 2)
    if method != "weighted":
        clean = torch.tensor(~text.shuffled[text.source])
        chosen = later[clean[later]] if method == "clean" else later
        return transformers.Trainer(model, args, train_dataset=examples(text.train[chosen]))
    data_weights = DataWeights(sources.SOURCES)
    return WeightedTrainer(
        model,
        args,
        train_dataset=examples(text.train[later], text.source[later]),
        data_weights=data_weights,
        outer_dataset=examples(text.validation),
        outer_every=size.every,
        outer_batch_size=size.outer_batch,
        outer_optimizer=torch.optim.Adam(data_weights.parameters(), size.rate),
    )


def run(method: str, folder: Path | None, size: sources.Size, seed: int, pretrained: Arrays) -> dict[str, float]:
    """Fine-tune, and return the measurements."""
    quiet()
    text = sources.read(folder, size, seed)
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(method, text, size, seed, pretrained, output)
        measured = {"test loss before": mean_loss(trainer.model.eval(), text.test)}  # LoRA starts at zero
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        short = replace(size, steps=4, every=2)
        mebibytes = sources.peak(lambda: trainer_of(method, text, short, seed, pretrained, output).train())
    if method == "weighted":
        w = trainer.data_weights().detach().numpy()
        measured["auc"] = sources.auc(w, text.shuffled)
        measured["weight of the clean half"] = float(w[~text.shuffled].sum() / w.sum())
    return measured | {
        "test loss": mean_loss(trainer.model.eval(), text.test),
        "CPU seconds": seconds,
        "MiB": mebibytes,
        "weights": sum(p.numel() for p in trainer.model.parameters()),
        "trained weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def quiet() -> None:
    """Take one thread, and print no tables of losses."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def main(argv: list[str] | None = None) -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has wikitext2_validtest/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    for name in ("every", "rate", "steps"):
        default = getattr(SIZE, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(argv)
    size = replace(SIZE, every=options.every, rate=options.rate, steps=options.steps)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        pretrained = sources.apart(pretrain, options.data, size, seed)
        for method in METHODS:
            found = sources.apart(run, method, options.data, size, seed, pretrained)
            print(f"{method:>10} seed {seed}:", {k: round(v, 3) for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main()
