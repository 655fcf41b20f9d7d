"""Weights of training examples, as in the paper's code."""

import numpy as np
import pytest
from dense import by_torch
from frameworks import relative_error
from paper_systems import check_stored, report_of

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
bilevel_torch = pytest.importorskip("bilevel_torch")


def test_tuned_weights_tell_wrong_labels_from_right_ones(histories):
    for variant in ("identity", "neumann", "cg", "network"):
        rows, result = histories[f"{variant}-0"]["rows"], histories[f"{variant}-0"]["result"]
        assert rows[-1]["val_loss"] < 0.9 * rows[0]["val_loss"]
        assert result["auc"] > 0.85
        assert result["weight_wrong"] < result["weight_right"] - 0.2
    assert histories["network-0"]["result"]["auc_unseen"] > 0.8


def test_training_with_tuned_weights_beats_training_on_all(histories):
    loss = {name: history["result"]["test_loss"] for name, history in histories.items()}
    for variant in ("identity", "neumann", "cg", "network"):
        assert loss["clean-0"] < loss[f"{variant}-0"] < 0.9 * loss["all-0"]


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


@pytest.mark.parametrize("network", [False, True])
def test_hypergradient_agrees_with_the_exact_one(system, network):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator).double(), torch.arange(30) % 3
    examples = system.Examples(x, y, y < 0)
    weigh = (system.WeightNet(4, 3) if network else system.ExampleWeights(30)).double()
    model = torch.nn.Linear(4, 3).double()
    inner = system.inner_loss(model, examples, weigh(x, y), 0.01)
    outer = torch.nn.functional.cross_entropy(model(x + 1), y)
    expected = by_torch(inner, outer, model.parameters(), weigh.parameters())
    solver = {"name": "cg", "maxiter": 200, "rtol": 1e-10}
    hg = bilevel_torch.hypergradient(inner, outer, model.parameters(), weigh.parameters(), solver=solver)
    assert np.linalg.norm(expected) > 0
    assert relative_error(np.concatenate([grad.numpy().ravel() for grad in hg.grad]), expected) < 1e-7


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert report_of(system, histories, tmp_path).count("\n| ") == len(histories) + 2
