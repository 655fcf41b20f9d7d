"""The section 5.2 of the paper, small: decays per weight fit the validation set, by the exact hypergradient."""

import pytest
from dense import by_torch
from frameworks import relative_error
from paper_systems import check_stored, report_of

torch = pytest.importorskip("torch")
for module in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import bilevel_torch  # noqa: E402


def test_decays_per_weight_lower_the_validation_loss(histories):
    for net in ("linear", "mlp", "cnn"):
        results = {method: histories[f"{net}-{method}-0"]["result"] for method in ("identity", "global", "untuned")}
        assert results["identity"]["val_loss"] < results["untuned"]["val_loss"]
        assert results["identity"]["hparams"] == results["identity"]["weights"]
        assert results["global"]["hparams"] == 1
        assert results["untuned"]["hparams"] == 0
    for net in ("alexnet", "resnet"):
        identity, untuned = (histories[f"{net}-{method}-0"]["result"] for method in ("identity", "untuned"))
        assert identity["val_loss"] < untuned["val_loss"]
    result = histories["cnn-identity-0"]["result"]
    assert result["val_accuracy"] > result["test_accuracy"]
    rows = histories["mlp-identity-0"]["rows"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


@pytest.mark.parametrize("net", ["cnn", "resnet"])
def test_a_run_with_signed_decays_stops_at_its_target(histories, net):
    signed = histories[f"{net}-signed-0"]
    assert signed["settings"]["bound"] == 0.05
    assert signed["result"]["val_loss"] < histories[f"{net}-untuned-0"]["result"]["val_loss"]
    accuracies = [row["val_accuracy"] for row in signed["rows"]]
    assert 1 not in accuracies[:-1]
    assert (signed["result"]["reached"] is None) == (accuracies[-1] < 1)


def test_networks_have_the_papers_number_of_decays(system):
    image = {"linear": (1, 28, 28), "mlp": (1, 28, 28)}
    counts = {
        name: sum(w.numel() for w in net.build(torch.zeros(image.get(name, (3, 32, 32)))).parameters())
        for name, net in system.NETS.items()
    }
    assert counts == {"linear": 7_850, "mlp": 623_290, "cnn": 545_098, "alexnet": 1_746_602, "resnet": 77_850}


def test_hypergradient_is_the_exact_one(system):
    torch.manual_seed(0)
    net = system.models.linear(6).double()
    train, val = ((torch.randn(20, 1, 2, 3).double(), torch.randint(10, (20,))) for _ in range(2))
    log_decays = [torch.full_like(w, -2.0, requires_grad=True) for w in net.parameters()]
    inner = system.inner_loss(net, [decays.exp() for decays in log_decays], train)
    outer = torch.nn.functional.cross_entropy(net(val[0]), val[1])
    expected = by_torch(inner, outer, net.parameters(), log_decays)
    solver = {**system.METHODS["cg"], "damping": 0.0, "maxiter": 200, "rtol": 1e-10}
    found = bilevel_torch.hypergradient(inner, outer, net.parameters(), log_decays, solver=solver).grad
    assert relative_error(torch.cat([grad.flatten() for grad in found]), expected) < 1e-6


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    assert "| one hidden layer, MNIST | per weight, identity |" in report_of(system, histories, tmp_path)
