"""What the paper's systems share: runs that go on where they were stopped, histories that are not made twice."""

import gzip
import json

import numpy as np
import pytest
from paper_systems import paper

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")


def train(path, stop=None):
    """Train with noise for ten steps, or until ``stop``; return the weights and the rows."""
    torch.manual_seed(0)
    net, scale = torch.nn.Linear(3, 1), torch.ones(2)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    loop = paper("loop").Loop(path, 10, {"net": net, "optimizer": optimizer, "scale": scale}, every=2)
    for step in loop:
        if step == stop:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = net(torch.randn(8, 3)).square().mean() * scale.sum()
        loss.backward()
        optimizer.step()
        scale *= 0.9
        loop.row(step=step, loss=loss.item())
    return [*net.parameters(), scale], loop.rows


def test_a_stopped_run_ends_as_if_nothing_had_been(tmp_path):
    weights, rows = train(tmp_path / "undisturbed")
    for stop in (5, 8):  # between two checkpoints, and at one
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", stop)
    again, rows_again = train(tmp_path / "stopped")
    assert rows_again == rows
    assert all(torch.equal(a, b) for a, b in zip(again, weights, strict=True))
    assert not list(tmp_path.iterdir())


def test_a_history_is_made_anew_for_other_settings_only(tmp_path):
    runs, calls = paper("runs"), []
    arguments = runs.options("", ["--out", str(tmp_path)])

    def run(path):
        calls.append(path)
        return {"rows": [], "result": {"loss": float(len(calls))}}

    for settings in ({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.2}):
        found = runs.stored(arguments, "system", "variant-0", settings, run)
    assert len(calls) == len(set(calls)) == 2  # and no checkpoint serves both
    assert found == json.loads((tmp_path / "system" / "variant-0.json").read_text())


def test_a_number_that_is_not_finite_is_not_stored(tmp_path):
    runs = paper("runs")
    arguments = runs.options("", ["--out", str(tmp_path)])
    with pytest.raises(FloatingPointError, match="system, variant: loss is nan"):
        runs.stored(arguments, "system", "variant", {}, lambda path: {"result": {"loss": float("nan")}})
    assert not list((tmp_path / "system").iterdir())


def test_unknown_variants_are_named(capsys):
    runs = paper("runs")
    with pytest.raises(SystemExit, match="no variant cq; there are cg, identity"):
        runs.variants(runs.options("", ["--only", "cq"]), {"cg": "cg", "identity": "identity"})
    with pytest.raises(SystemExit):
        runs.options("", ["--fast"])
    assert "--fast needs --out DIR" in capsys.readouterr().err


def test_mnist_is_read_from_idx_files(tmp_path):
    data, folder = paper("data"), tmp_path / "mnist"
    with pytest.raises(FileNotFoundError, match=r"no train10k-images-idx3-ubyte\.gz\. --data DIR is the folder above"):
        data.mnist(tmp_path)
    folder.mkdir()
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for part in ("train10k", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.array([7, 1], np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    name, train, test = data.mnist(tmp_path)
    assert name == "MNIST"
    assert (train.x * 255 == images[:, None]).all()
    assert train.y.tolist() == test.y.tolist() == [7, 1]
