"""The benchmarks of `bilevel_torch.FirstOrder` run, and find what they search for."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = {"vocabulary": 50, "words": 6, "width": 8, "layers": 1, "heads": 2}  # of the networks of `sources`


def test_wrong_labels_are_found():
    from benchmarks.first_order import cleaning

    of = cleaning.read(None, 0)
    scores = {name: cleaning.run(name, "linear", of, 400, 0)[1] for name in ("none", "f2sa", "tracked")}
    assert scores.pop("none") == 0
    assert min(scores.values()) > 0.7


def test_shuffled_sources_are_measured():
    from benchmarks.first_order import sources

    size = sources.Size(**SMALL, steps=24, batch=8, start=4, early=2, every=4, repeats=1, summed=1)
    for method in sources.METHODS:
        found = sources.run(method, None, size, 0, compiled=False, bfloat16=method == "sama", again=True)
        assert np.isfinite(found["test loss"])
        assert 0 <= found["auc"] <= 1
        assert len(found["path"]) == (0 if method in ("uniform", "clean") else 7)
        assert ("test loss again" in found) == bool(found["path"])


def test_ratios_are_by_seed():
    from benchmarks.first_order import sources

    clean = [dict.fromkeys(sources.RATIOS, x) for x in (1.0, 2.0, 4.0)]
    sampled = [dict.fromkeys(sources.RATIOS, x) for x in (3.0, 2.0, 8.0)]
    found = dict(sources.medians({"clean": clean, "sampled": sampled}))
    assert set(found["clean"]) == set(sources.RATIOS)
    assert found["sampled"]["MiB"] == "3.000 (2.000 to 8.000)"
    assert found["sampled"]["MiB / clean"] == "2.000 (1.000 to 3.000)"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_lora_is_trained_by_trainers():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.first_order import lora, sources

    size = sources.Size(**SMALL, steps=4, batch=4, every=2)
    pretrained = lora.pretrain(None, size, 0)
    for method in lora.METHODS:
        found = lora.run(method, None, size, 0, pretrained)
        assert np.isfinite(found["test loss"])
        assert found["MiB"] > 0
        assert found["trained weights"] < found["weights"]
        assert ("auc" in found) == (method == "weighted")


def test_settings_of_weights_are_compared():
    from benchmarks.first_order import recipe

    settings = recipe.settings("tracked")
    assert len(settings) == len(set(settings.values())) == 10
    of = recipe.read(None, 0)
    found = dict(zip(recipe.COLUMNS, recipe.run(settings["base"], "linear", of, 200, 0), strict=True))
    assert found["F1"] > 0.8
    assert min(found["test again"], found["test without"]) > 0.8


def test_penalties_are_tuned_by_four_gradients_a_step():
    from benchmarks.first_order import features

    data = features.split(None, 0)
    best = {}
    for name, gradients, error in features.errors(data):
        best[name] = min(error, best.get(name, 1.0))
        assert gradients > 0
    assert best["cg"] < 1e-3 * best["penalty, descent"]
    hparams, gradients = features.first_order(data, 10)
    assert gradients <= 4
    assert (hparams != features.START).all()


def test_perceptron_of_one_vector_is_a_perceptron():
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    import torch

    from benchmarks.first_order import published

    pixels = 5
    w = published.perceptron_weights(pixels, 0)
    x, label = np.random.default_rng(0).normal(size=pixels).astype(w.dtype), 3
    sizes = [(pixels, published.HIDDEN), (published.HIDDEN,), (published.HIDDEN, published.CLASSES), (10,)]
    a, b, c, d = torch.tensor(np.asarray(w)).split([int(np.prod(size)) for size in sizes])
    hidden = (torch.tensor(x) @ a.reshape(sizes[0]) + b).relu()
    expected = torch.nn.functional.cross_entropy(hidden @ c.reshape(sizes[2]) + d, torch.tensor(label))
    loss = published.perceptron_loss(w, None, x, jax.nn.one_hot(label, published.CLASSES))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_look_ahead_steps_agree():
    from benchmarks.first_order import lookahead

    cosines = lookahead.main(["--rounds", "2"])
    assert set(cosines) >= {"by hand", "TrainingStep", "FirstOrder"}
    assert cosines["TrainingStep"] > 1 - 1e-5
    assert min(cosines.values()) > 0.99


class TestSearch:
    def test_halving_trains_the_best_longer(self):
        from benchmarks.first_order import search

        parts = []

        def train(weights, part):
            parts.append(part)
            return float(weights.scores.detach()[0]), None, weights

        loss, _, weights = search.search("halving", train, 3, 4, 0)
        assert parts == [8] * 8 + [4] * 2 + [1]
        best = search.search("random", train, 3, 8, 0)
        assert parts[11:] == [1] * 8
        assert loss == best[0]
        assert (weights.scores == best[2].scores).all()

    @pytest.mark.parametrize("method", ["equal weights", "first order", "random", "halving"])
    def test_methods_run_on_both_tasks(self, method):
        from benchmarks.first_order import search, sources

        accuracy, f1, _ = search.clean(method, None, 100, 2, 0)
        assert accuracy > 0.4
        assert (f1 == 0) == (method == "equal weights")
        size = sources.Size(**SMALL, steps=16, batch=8, start=4, every=4)
        *losses, auc, _ = search.find(method, None, size, 2, 0)
        assert np.isfinite(losses).all()
        assert (auc == 0.5) if method == "equal weights" else (0 <= auc <= 1)
