"""The benchmark of metagradients on a text computes what it states."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")  # the score is shared with a benchmark of JAX
pytest.importorskip("sklearn")

import torch

ROOT = Path(__file__).parents[2]
TINY = {"examples": 20, "words": 5, "vocabulary": 12, "width": 8, "steps": 20, "batch": 5, "queries": 3, "runs": 4}


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a text of random words, which are not equally frequent."""
    rng = np.random.default_rng(0)
    (tmp_path / "wikitext2_validtest").mkdir()
    for name in ("valid.txt", "test.txt"):
        words = rng.geometric(0.15, 400).astype(str)
        (tmp_path / "wikitext2_validtest" / name).write_text(" ".join(words) + "\n")
    return tmp_path


@pytest.fixture
def language(folder):
    from benchmarks.metagradients import language

    sizes = language.Sizes(**TINY)
    return language.Language(*language.chunks(folder, sizes), sizes)


def test_chunks_do_not_overlap_and_rare_words_are_one(language, folder):
    text = (folder / "wikitext2_validtest" / "valid.txt").read_text().split()
    numbers = language.examples.flatten().tolist()
    assert language.examples.shape == (20, 6)
    assert max(numbers) == 11
    pairs = {(word, number) for word, number in zip(text, numbers, strict=False) if number}
    assert len(pairs) == 11  # one number for each frequent word


def test_the_model_reads_earlier_words_only(language):
    words = language.examples[:2, :-1].clone()
    before = language.model(words)
    words[:, 3] = (words[:, 3] + 1) % 12
    changed = (language.model(words) != before).any(-1)
    assert not changed[:, :3].any()
    assert changed[:, 3:].all()


def test_the_weight_of_an_example_scales_its_loss(language):
    words, rows = language.batches[0]
    weights = torch.zeros(20)
    weights[rows[2]] = 5.0
    from benchmarks.metagradients.language import of_chunks

    expected = of_chunks(language.model(words[2:3, :-1]), words[2:3, 1:])[0]
    torch.testing.assert_close(language.loss(language.model, weights, (words, rows)), expected)


@pytest.mark.slow
def test_the_table_has_all_methods(folder, capsys):
    from benchmarks.metagradients.language import main

    options = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    found = {name: lds for name, lds, _ in main(["--data", str(folder), *options])}
    assert len(found) == 5
    assert all(-1 <= lds <= 1 for lds in found.values())
    assert found["metagradient, with its report"] > 0.5
    printed = capsys.readouterr().out
    assert "| identity |" in printed
    assert "agreement" in printed
