"""The section 5.2 of the paper, small: decays per weight fit the validation set, by the exact hypergradient."""

import pytest
from frameworks import paper, relative_error

torch = pytest.importorskip("torch")
for module in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import bilevel_torch  # noqa: E402


@pytest.fixture(scope="module")
def overfit():
    return paper("overfit")


@pytest.fixture(scope="module")
def found(overfit, tmp_path_factory):
    out = tmp_path_factory.mktemp("overfit")
    return out, overfit.main(["--fast", "--out", str(out)])


def test_decays_per_weight_lower_the_validation_loss(found):
    for net in ("linear", "mlp", "cnn"):
        results = {method: found[1][f"{net}-{method}-0"]["result"] for method in ("identity", "global", "untuned")}
        assert results["identity"]["val_loss"] < results["untuned"]["val_loss"]
        assert results["identity"]["hparams"] == results["identity"]["weights"]
        assert results["global"]["hparams"] == 1
        assert results["untuned"]["hparams"] == 0
    assert found[1]["cnn-identity-0"]["result"]["val_accuracy"] > found[1]["cnn-identity-0"]["result"]["test_accuracy"]
    rows = found[1]["mlp-identity-0"]["rows"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_networks_have_the_papers_number_of_decays(overfit):
    image = {"linear": (1, 28, 28), "mlp": (1, 28, 28)}
    counts = {
        name: sum(w.numel() for w in net.build(torch.zeros(image.get(name, (3, 32, 32)))).parameters())
        for name, net in overfit.NETS.items()
    }
    assert counts == {"linear": 7_850, "mlp": 623_290, "cnn": 545_098, "alexnet": 1_746_602, "resnet": 77_850}


def test_hypergradient_is_the_exact_one(overfit):
    torch.manual_seed(0)
    net = overfit.models.linear(6).double()
    train, val = ((torch.randn(20, 1, 2, 3).double(), torch.randint(10, (20,))) for _ in range(2))
    log_decays = [torch.full_like(w, -2.0, requires_grad=True) for w in net.parameters()]
    inner = overfit.inner_loss(net, log_decays, train)
    outer = torch.nn.functional.cross_entropy(net(val[0]), val[1])
    solvers = ("exact", {**overfit.METHODS["cg"], "damping": 0.0, "maxiter": 200, "rtol": 1e-10})
    exact, cg = (
        bilevel_torch.hypergradient(inner, outer, net.parameters(), log_decays, solver=solver).grad
        for solver in solvers
    )
    for a, b in zip(cg, exact, strict=True):
        assert relative_error(a, b) < 1e-6


def test_stored_histories_are_not_run_again(overfit, found, monkeypatch):
    out, histories = found
    monkeypatch.setattr(overfit, "Loop", None)
    assert overfit.main(["--fast", "--out", str(out)]) == histories


def test_report_of_it(found, tmp_path):
    report = paper("report.overfit")
    assert all(report.row(found[1]))
    section = report.section(found[1], tmp_path)
    assert "| one hidden layer, MNIST | per weight, identity |" in section
    assert (tmp_path / "overfit.png").exists()
