"""What a hypergradient costs: the measurement runs, and is stored."""

import pytest
from frameworks import paper

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_each_variant_is_measured_once(tmp_path, monkeypatch):
    cost = paper("cost")
    given = ["--fast", "--out", str(tmp_path), "--only", "identity", "neumann 20"]
    histories = cost.main(given)
    few, many = (history["result"] for history in histories.values())
    assert few["hyperparameters"] == many["hyperparameters"] == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    assert many["gradients"] > few["gradients"] > 1
    monkeypatch.setattr(cost, "measure", None)
    assert cost.main(given) == histories
