"""`bilevel_torch.trainers.huggingface`: weighted losses of transformers' trainers, and their weights."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from accelerate.state import AcceleratorState
from language_models import HELD, SCORES, TRAIN, arguments, classifier, llama, weighted
from torch.nn.functional import cross_entropy

import bilevel_torch
from bilevel_torch.data import DataWeights
from bilevel_torch.trainers.collator import KeepColumn
from bilevel_torch.trainers.huggingface import DataWeightsMixin


def mean_of(model, weights, examples):
    """Return Σ w ℓ / number of labels, one example at a time."""
    total, count = 0.0, 0
    for example in examples:
        tokens, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logits = model(input_ids=tokens).logits[0, :-1]
        w = weights(torch.tensor(example["source"])) if "source" in example else 1.0
        total = total + (w * cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)).sum()
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        # Batches of 5, 5 and 2, and steps of two batches and of one.
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 2},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "per_device_eval_batch_size": 5},
        {"label_smoothing_factor": 0.3},
        {"bf16": True, "max_grad_norm": 0.1},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_with_equal_weights_the_run_is_the_plain_run(tmp_path, options):
    options = {"max_steps": 3} | options
    plain = transformers.Trainer(
        llama(),
        arguments(tmp_path, **options),
        train_dataset=[{k: v for k, v in example.items() if k != "source"} for example in TRAIN],
    )
    plain.train()
    other = weighted(tmp_path, every=100, **options)
    other.train()
    for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert other.evaluate(HELD)["eval_loss"] == pytest.approx(plain.evaluate(HELD)["eval_loss"], rel=1e-4)


def test_steps_are_those_of_a_loop(tmp_path):
    """Two micro-batches: a step of SGD on Σ w ℓ / number of labels, and a step of Adam along the hypergradient."""
    trainer = weighted(
        tmp_path,
        TRAIN[:4],
        scores=SCORES,
        every=1,
        max_steps=1,
        optim="sgd",
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
    )
    trainer.train()
    model, weights = llama(), DataWeights(3)
    weights.scores.data.copy_(SCORES)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    outer_optimizer = torch.optim.Adam(weights.parameters(), 0.1)
    mean_of(model, weights, TRAIN[:4]).backward()
    optimizer.step()
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    generator = torch.Generator().manual_seed(trainer.args.seed)
    held = next(iter(torch.utils.data.DataLoader(HELD, 2, shuffle=True, collate_fn=list, generator=generator)))
    hg = bilevel_torch.FirstOrder(model, weights.parameters()).backward(
        lambda: mean_of(model, weights, TRAIN[:4]),
        lambda: mean_of(model, weights, held),
        accumulate=False,
    )
    outer_optimizer.step()
    assert trainer.state.log_history[0]["outer_loss"] == pytest.approx(float(hg.value), rel=1e-4)
    torch.testing.assert_close(trainer.data_weights.scores, weights.scores, rtol=1e-3, atol=1e-5)


def test_resumed_run_has_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = weighted(tmp_path / "whole", every=1, **options)
    whole.train()
    resumed = weighted(tmp_path / "resumed", every=1, scores=SCORES, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(whole.data_weights.scores, resumed.data_weights.scores)
    assert whole.data_weights.scores.abs().min() > 0
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "whole" / "checkpoint-3" / "bilevel.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-3 has no bilevel.pt"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_packed_tokens_have_weights(tmp_path):
    """Two texts in one row, with positions that start again, have the loss of two rows."""
    trainer = weighted(tmp_path, scores=SCORES)
    examples = [TRAIN[0], TRAIN[4]]
    collator = KeepColumn(transformers.DataCollatorWithFlattening(), "source")
    packed = collator([example | {"source": [example["source"]] * 6} for example in examples])
    assert packed["source"].tolist() == [[0] * 6 + [1] * 6]
    expected = mean_of(trainer.model, trainer.data_weights, examples)
    trainer.model.train()
    torch.testing.assert_close(trainer._loss(packed, weighted=True), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, packed), expected, rtol=1e-5, atol=1e-6)


def padding(examples):
    """A collator that pads to the longest text: on the left, or on the right."""
    longest = max(len(example["input_ids"]) for example in examples)
    mask = [[0] * (longest - len(e["input_ids"])) + [1] * len(e["input_ids"]) for e in examples]
    return {"input_ids": torch.zeros(len(examples), longest, dtype=torch.long), "attention_mask": torch.tensor(mask)}


def test_collator_pads_numbers_of_tokens_like_tokens():
    examples = [{"input_ids": [1, 2], "source": [7, 8]}, {"input_ids": [1, 2, 3], "source": [4, 5, 6]}]
    assert KeepColumn(padding, "source")(examples)["source"].tolist() == [[0, 7, 8], [4, 5, 6]]


def test_collator_names_mistakes():
    collator = KeepColumn(padding, "source")
    with pytest.raises(ValueError, match="Some examples of a batch have no 'source'"):
        collator([{"input_ids": [1], "source": 0}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"'source': got \[1\] integers for tokens of the shape \(1, 2\)"):
        collator([{"input_ids": [1, 2], "source": [0]}])
    assert collator([{"input_ids": [1, 2]}]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_compiled_model_gives_the_same_weights(tmp_path):
    torch._dynamo.reset()
    runs = [
        weighted(tmp_path, max_steps=2, **options)
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    for run in runs:
        run.train()
    torch._dynamo.reset()
    assert isinstance(runs[1].model_wrapped, torch._dynamo.OptimizedModule)
    AcceleratorState._reset_state(reset_partial_state=True)  # else later trainers in this process compile, too
    torch.testing.assert_close(*[run.data_weights.scores for run in runs], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own use
def test_lora_moves_only_its_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = weighted(tmp_path, model=model, bf16=True, activation_checkpointing=True)
    trainer.train()
    assert trainer.data_weights.scores.abs().min() > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name)
    assert trainer.state.log_history[1].keys() >= {"loss", "outer_loss", "weight_0", "weight_2"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_diagnose_finds_that_dora_detaches(dora):
    """Its gradient is no derivative of the loss, and its product is no derivative of the gradient."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).double(), torch.randn(2, 6, 4).double()
    config = peft.LoraConfig(target_modules=["0"], r=2, use_dora=dora, init_lora_weights=False)
    model = peft.PeftModel(net, config).double()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scores = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def inner():
        return (scores.exp() * ((model(x[0]) - 1) ** 2).sum(1)).mean() + sum((p**2).sum() for p in params.values())

    report = str(bilevel_torch.diagnose(inner, lambda: (model(x[1]) ** 2).mean(), params, scores, solver="identity"))
    assert ("WRONG" in report) == dora


def test_other_models_are_weighted_per_example(tmp_path):
    model = classifier().eval()
    trainer = weighted(tmp_path, model=model, scores=SCORES)
    batch = {"input_ids": torch.tensor([TRAIN[i]["input_ids"] for i in range(3)]), "labels": torch.tensor([0, 2, 1])}
    batch["source"] = torch.tensor([2, 0, 1])
    logits = model(input_ids=batch["input_ids"]).logits
    w = trainer.data_weights(batch["source"])
    expected = (w * cross_entropy(logits, batch["labels"], reduction="none")).mean()
    torch.testing.assert_close(trainer._loss(batch, weighted=True), expected)


def test_micro_batches_of_a_classifier_are_one_batch(tmp_path):
    """The trainer itself takes the sum of their means (findings/transformers-classifier-accumulation.sh)."""
    train = [{**example, "labels": i % 3} for i, example in enumerate(TRAIN[:8])]
    moved = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = classifier()
        trainer = weighted(
            tmp_path,
            train,
            model,
            every=9,
            scores=SCORES,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-7)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqr"])}
    whole = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_supervised_fine_tuning_by_trl(tmp_path):
    """The weights move, and the weighted losses of TRL's batches are right for texts and for packed texts."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class WeightedSFTTrainer(DataWeightsMixin, trl.SFTTrainer):
        pass

    texts = datasets.Dataset.from_list([{"text": " ".join("abcdefgh"[i % 4 :]), "source": i % 3} for i in range(8)])
    held = datasets.Dataset.from_list([{**example, "source": 0} for example in HELD]).remove_columns("source")

    def trainer(train, **options):
        config = trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
            max_length=16,
            dataloader_pin_memory=False,
            logging_steps=1,
            **options,
        )
        return WeightedSFTTrainer(
            llama(),
            config,
            train_dataset=train,
            processing_class=tokenizer(),
            data_weights=DataWeights(3),
            outer_dataset=held,
            outer_every=1,
        )

    def loss(run, examples):
        batch = run.data_collator(examples)
        with torch.no_grad():
            run.data_weights.scores.copy_(SCORES)
            run.model.train()
            return run._loss(batch, weighted=True), run.compute_loss(run.model, batch)

    run = trainer(texts)
    run.train()
    assert run.data_weights.scores.abs().max() > 0
    examples = run.train_dataset.select_columns(["input_ids", "labels", "source"])
    found = loss(run, list(examples))
    expected = mean_of(run.model, run.data_weights, list(examples)).detach()
    torch.testing.assert_close(torch.stack(found), expected.expand(2), rtol=1e-5, atol=1e-6)

    packed = trl.pack_dataset(examples.map(lambda x: {"source": [x["source"]] * len(x["input_ids"])}), seq_length=16)
    run = trainer(packed, packing=True, dataset_kwargs={"skip_prepare_dataset": True}, padding_free=True)
    run.train()
    assert run.data_weights.scores.abs().max() > 0
    found = loss(run, list(packed))
    expected = mean_of(run.model, run.data_weights, list(examples)).detach()
    torch.testing.assert_close(torch.stack(found), expected.expand(2), rtol=1e-5, atol=1e-6)
